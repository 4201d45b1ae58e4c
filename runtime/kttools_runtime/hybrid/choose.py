"""Which routed experts go to the devices: as many as asked for or as fit, the most used first.

The rule of a load and of `kttools plan`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kttools_runtime import env
from kttools_runtime.config import ModelConfig
from kttools_runtime.device_footprint import DeviceFootprint, hot_rooms
from kttools_runtime.errors import ResourceError, UsageError

from .hot_codes import hot_expert_bytes
from .hot_request import HotRequest, read_request
from .options import HybridOptions
from .untile import PackFile


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
    request = read_request(options.gpu_experts, config)
    rooms = _rooms(options, config, packs, footprints, dtype) if request.is_auto else ()
    return choose_hot(request, config, footprints, rooms)


def choose_hot(
    request: HotRequest,
    config: ModelConfig,
    footprints: Sequence[DeviceFootprint],
    rooms: Sequence[int] = (),
) -> dict[int, list[int]]:
    """Expert ids by MoE layer, sorted. rooms: how many each device has place for, asked with auto alone."""
    if request.listed is not None:
        return dict(request.listed)
    runs = [[i for i in config.moe_layers if own.layers[0] <= i < own.layers[1]] for own in footprints]
    totals = rooms if request.wanted is None else [request.wanted * len(layers) for layers in runs]
    chosen: dict[int, list[int]] = {}
    for layers, total in zip(runs, totals, strict=True):
        chosen |= most_used(request.counts, layers, config.n_routed_experts, total)
    return chosen


def most_used(
    counts: Mapping[int, Tensor], layers: Sequence[int], num_experts: int, total: int
) -> dict[int, list[int]]:
    """The `total` most used (layer, expert) pairs of these layers; without counts as many in each, the first
    ones getting what is over."""
    if not layers or not all(layer in counts for layer in layers):
        each, over = divmod(total, max(1, len(layers)))
        return {layer: list(range(each + (place < over))) for place, layer in enumerate(layers)}
    share = torch.stack([_shares(counts[layer]) for layer in layers])
    best = share.flatten().argsort(descending=True, stable=True)[:total].tolist()
    chosen: dict[int, list[int]] = {layer: [] for layer in layers}
    for index in best:
        chosen[layers[index // num_experts]].append(index % num_experts)
    return {layer: sorted(experts) for layer, experts in chosen.items()}


def hit_share(
    counts: Mapping[int, Tensor], chosen: Mapping[int, Sequence[int]], config: ModelConfig
) -> float:
    """Of a token's choices in all MoE layers, those of `chosen` experts: by the counts, else each alike."""
    alike = torch.ones(config.n_routed_experts, dtype=torch.float64)
    shares = (float(_shares(counts.get(i, alike))[list(ids)].sum()) for i, ids in chosen.items())
    return min(1.0, sum(shares) / max(1, len(config.moe_layers)))


def _shares(counts: Tensor) -> Tensor:
    """Each expert's part of a layer's choices; alike where nothing was counted."""
    total = counts.sum()
    return counts / total if total > 0 else torch.full_like(counts, 1 / len(counts))


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
