"""What --gpu-experts asks for: how many experts, chosen by whose counts, or exactly which."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kttools_runtime import strict_json
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError, UsageError
from kttools_runtime.safetensors_file import read_header, read_tensor

PROFILE_FORMAT, LIST_FORMAT = "kttools-expert-profile", "kttools-gpu-experts"
SYNTAX = "expected auto, a number of experts per layer, a FILE, or auto:FILE or N:FILE"
MOST_DIGITS = 9


@dataclass(frozen=True, slots=True, eq=False)
class HotRequest:
    """wanted: routed experts of every layer, None: as many as fit. counts: how often each expert of a layer
    was chosen, {}: not known. listed: exactly these by layer, whatever the rest says. file: what was read."""

    wanted: int | None
    counts: Mapping[int, Tensor]
    listed: Mapping[int, list[int]] | None = None
    file: Path | None = None

    @property
    def text(self) -> str:
        """As it is typed."""
        if self.listed is not None:
            return str(self.file)
        number = "auto" if self.wanted is None else str(self.wanted)
        return number if self.file is None else f"{number}:{self.file}"

    @property
    def is_auto(self) -> bool:
        """Whether the memory that is free decides how many."""
        return self.wanted is None and self.listed is None

    def with_number(self, wanted: int | None) -> "HotRequest":
        """So many of every layer, or as many as fit; a list is given up."""
        return replace(self, wanted=wanted, listed=None, file=None if self.listed is not None else self.file)

    def per_layer(self, config: ModelConfig) -> tuple[tuple[int, int], ...]:
        """(MoE layer, experts of it), about: counts may give a layer more and another less. () with auto."""
        if self.listed is not None:
            return tuple((layer, len(ids)) for layer, ids in self.listed.items())
        return tuple((layer, self.wanted) for layer in config.moe_layers) if self.wanted else ()


def read_request(text: str, config: ModelConfig) -> HotRequest:
    """Raises UsageError for what is none, InvalidInputError for a file that is none or another model's."""
    wanted, file = parse_request(text)
    if wanted is not None and wanted > config.n_routed_experts:
        raise UsageError(f"gpu-experts: {wanted} of {config.n_routed_experts} experts per layer")
    if file is None:
        return HotRequest(wanted, {})
    document = strict_json.read_object(file)
    if document.get("format") != LIST_FORMAT:
        return HotRequest(wanted, profile_counts(document, file, config), None, file)
    if text != str(file) and text.partition(":")[0] in ("auto", str(wanted)):
        raise UsageError(f"gpu-experts {text!r}: {file} is a list, which says how many: give it alone")
    return HotRequest(None, {}, listed_experts(document, file, config), file)


def parse_request(text: str) -> tuple[int | None, Path | None]:
    """(number per layer, None: as many as fit; a profile or list, None: without). Raises UsageError."""
    head, colon, tail = text.partition(":")
    is_number = head.isascii() and head.isdecimal() and len(head) <= MOST_DIGITS
    wanted = int(head) if is_number else None
    if not is_number and head != "auto":
        tail, wanted = text, None
    elif not colon:
        return wanted, None
    elif not tail:
        raise UsageError(f"gpu-experts {text!r}: {SYNTAX}")
    if not _is_file(Path(tail)):
        raise UsageError(f"gpu-experts {text[:200]!r}: no such file; {SYNTAX}")
    return wanted, Path(tail)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a directory that may not be searched
        return False


def listed_experts(document: dict[str, object], file: Path, config: ModelConfig) -> dict[int, list[int]]:
    """{"format": "kttools-gpu-experts", "layers": {"3": [0, 5]}}. Raises InvalidInputError."""
    layers = document.get("layers")
    if set(document) != {"format", "layers"} or not isinstance(layers, dict):
        raise InvalidInputError(f"{file}: expected the keys format and layers, an object by layer")
    known = {str(layer): layer for layer in config.moe_layers}
    result = {}
    for key, ids in layers.items():
        is_list = isinstance(ids, list) and all(type(i) is int for i in ids)
        if key not in known or not is_list or len(set(ids)) != len(ids):
            raise InvalidInputError(
                f"{file}: layer {key[:20]!r}: expected different expert ids of a MoE layer"
            )
        if not all(0 <= i < config.n_routed_experts for i in ids):
            raise InvalidInputError(f"{file}: layer {key}: an id is outside 0..{config.n_routed_experts - 1}")
        result[known[key]] = sorted(ids)
    return result


def profile_counts(document: dict[str, object], file: Path, config: ModelConfig) -> dict[int, Tensor]:
    """How often every expert was chosen, all domains together, from an expert profile and its sidecar."""
    sidecar = document.get("sidecar")
    name = sidecar.get("file") if isinstance(sidecar, dict) else None
    if document.get("format") != PROFILE_FORMAT or not isinstance(name, str) or Path(name).name != name:
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
