"""Which routed experts go to the devices: as many as asked for or as fit, the most used first."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kttools_runtime import env, strict_json
from kttools_runtime.config import ModelConfig
from kttools_runtime.device_footprint import DeviceFootprint, hot_rooms
from kttools_runtime.errors import InvalidInputError, ResourceError, UnsupportedModelError, UsageError
from kttools_runtime.safetensors_file import read_header, read_tensor

from .hot_codes import hot_expert_bytes
from .options import HybridOptions
from .untile import PackFile

PROFILE_FORMAT, LIST_FORMAT = "kttools-expert-profile", "kttools-gpu-experts"
SYNTAX = "expected auto, a number of experts per layer, a FILE, or auto:FILE or N:FILE"


def hot_experts(
    options: HybridOptions,
    config: ModelConfig,
    packs: Mapping[int, PackFile],
    footprints: Sequence[DeviceFootprint],
    dtype: torch.dtype = torch.bfloat16,
) -> dict[int, list[int]]:
    """Expert ids by layer, sorted. Raises UsageError, InvalidInputError, ResourceError."""
    if options.gpu_experts is None or not packs:
        return {}
    if not has_plain_experts(config):
        raise UnsupportedModelError("gpu-experts: this model's experts have biases or another gate")
    wanted, file = parse_request(options.gpu_experts)
    counts: dict[int, Tensor] = {}
    if file is not None:
        document = strict_json.read_object(file)
        if document.get("format") == LIST_FORMAT:
            return listed_experts(document, file, config)
        counts = profile_counts(document, file, config)
    if wanted is not None and wanted > config.n_routed_experts:
        raise UsageError(f"gpu-experts: {wanted} of {config.n_routed_experts} experts per layer")
    runs = [[i for i in packs if own.layers[0] <= i < own.layers[1]] for own in footprints]
    if wanted is None:
        totals = _rooms(options, config, packs, footprints, dtype)
    else:
        totals = tuple(wanted * len(layers) for layers in runs)
    chosen: dict[int, list[int]] = {}
    for layers, total in zip(runs, totals, strict=True):
        chosen |= most_used(counts, layers, config.n_routed_experts, total)
    return chosen


def has_plain_experts(config: ModelConfig) -> bool:
    """Whether experts are down(silu(gate) * up) without biases, which is all that a device computes."""
    return not config.expert_bias and config.swiglu_limit is None


def parse_request(text: str) -> tuple[int | None, Path | None]:
    """(number per layer, None: as many as fit; a profile or list, None: without)."""
    head, colon, tail = text.partition(":")
    if head == "auto" or head.isdecimal():
        if colon and not tail:
            raise UsageError(f"gpu-experts {text!r}: {SYNTAX}")
        return None if head == "auto" else int(head), Path(tail) if colon else None
    if not Path(text).is_file():
        raise UsageError(f"gpu-experts {text!r}: no such file; {SYNTAX}")
    return None, Path(text)


def most_used(
    counts: Mapping[int, Tensor], layers: Sequence[int], num_experts: int, total: int
) -> dict[int, list[int]]:
    """The `total` most used (layer, expert) pairs of these layers; without counts as many in each, the first
    ones getting what is over."""
    if not layers or not all(layer in counts for layer in layers):
        each, over = divmod(total, max(1, len(layers)))
        return {layer: list(range(each + (place < over))) for place, layer in enumerate(layers)}
    share = torch.stack([counts[layer] / counts[layer].sum().clamp(min=1e-30) for layer in layers])
    best = share.flatten().argsort(descending=True, stable=True)[:total].tolist()
    chosen: dict[int, list[int]] = {layer: [] for layer in layers}
    for index in best:
        chosen[layers[index // num_experts]].append(index % num_experts)
    return {layer: sorted(experts) for layer, experts in chosen.items()}


def listed_experts(document: dict[str, object], file: Path, config: ModelConfig) -> dict[int, list[int]]:
    """{"format": "kttools-gpu-experts", "layers": {"3": [0, 5]}}. Raises InvalidInputError."""
    layers = document.get("layers")
    if set(document) != {"format", "layers"} or not isinstance(layers, dict):
        raise InvalidInputError(f"{file}: expected the keys format and layers")
    result = {}
    for key, ids in layers.items():
        layer = int(key) if key.isdecimal() else -1
        is_list = isinstance(ids, list) and all(type(i) is int for i in ids)
        if layer not in config.moe_layers or not is_list or len(set(ids)) != len(ids):
            raise InvalidInputError(f"{file}: layer {key!r}: expected different expert ids of a MoE layer")
        if not all(0 <= i < config.n_routed_experts for i in ids):
            raise InvalidInputError(f"{file}: layer {key}: an id is outside 0..{config.n_routed_experts - 1}")
        result[layer] = sorted(ids)
    return result


def profile_counts(document: dict[str, object], file: Path, config: ModelConfig) -> dict[int, Tensor]:
    """How often every expert was chosen, all domains together, from an expert profile and its sidecar."""
    sidecar = document.get("sidecar")
    name = sidecar.get("file") if isinstance(sidecar, dict) else None
    if document.get("format") != PROFILE_FORMAT or not isinstance(name, str) or "/" in name:
        raise InvalidInputError(f"{file}: neither an expert profile nor a list of experts")
    tensors = read_header(file.parent / name).tensors
    found = [info for key, info in tensors.items() if key.endswith("/count")]
    shape = (len(config.moe_layers), config.n_routed_experts)
    if not found or any(tuple(info.shape) != shape for info in found):
        raise InvalidInputError(f"{file}: is the profile of another model: expected counts of shape {shape}")
    total = torch.stack([read_tensor(info).to(torch.float64) for info in found]).sum(dim=0)
    if not bool((total.isfinite() & (total >= 0)).all()):
        raise InvalidInputError(f"{file}: counts must be finite and not negative")
    return dict(zip(config.moe_layers, total, strict=True))


def _rooms(
    options: HybridOptions,
    config: ModelConfig,
    packs: Mapping[int, PackFile],
    footprints: Sequence[DeviceFootprint],
    dtype: torch.dtype,
) -> tuple[int, ...]:
    """Experts that each device takes beside the rest. Raises ResourceError where there is room for none."""
    names = [pack.names for pack in packs.values()]
    each = hot_expert_bytes(names, config.hidden_size, config.moe_intermediate_size, dtype)
    rooms = hot_rooms(footprints, config.moe_layers, each, config.n_routed_experts, _free(options))
    if not any(rooms):
        raise ResourceError("gpu-experts auto: no device memory is left for experts beside the rest")
    return rooms


def _free(options: HybridOptions) -> list[int]:
    """Bytes of each device."""
    if not options.devices.is_simulated:
        return [torch.cuda.mem_get_info(index)[0] for index in options.devices.cuda_indices]
    budget = env.simulated_vram()
    if budget is None:
        raise UsageError(
            "gpu-experts auto: simulated devices have no memory of their own; give a number, or set"
            " KTTOOLS_SIMULATED_VRAM"
        )
    return [budget] * len(options.devices.names)
