"""Device weights as a shard stores them: what a linear is made of, before any implementation is chosen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .block_formats import BLOCK_FORMATS, BLOCKS_PART, dequantized
from .errors import InvalidInputError

# The int8 kernels sum a whole row of products in int32: |activation| <= 127 and |weight| <= 128, for int8 as
# for int4, whose s q - z fits int8. Floats and GGUF's blocks (a float scale every 32 to 256 inputs) have no
# such bound.
MAX_SUM_INPUTS = (2**31 - 1) // (127 * 128)  # 132104

# Suffixes in a shard, by format; "float" is an unquantised matrix (BF16, or F16/F32 as the source had it).
PARTS: Mapping[str, tuple[str, ...]] = {
    "float": ("weight",),
    "int8": ("qweight", "row_scale"),
    "int4": ("qweight", "group_scale", "group_zero", "row_scale"),
    **dict.fromkeys(BLOCK_FORMATS, (BLOCKS_PART,)),
}
_DTYPES: Mapping[str, Mapping[str, tuple[torch.dtype, ...]]] = {
    "float": {"weight": (torch.bfloat16, torch.float16, torch.float32)},
    "int8": {"qweight": (torch.int8,), "row_scale": (torch.float32,)},
    "int4": {
        "qweight": (torch.uint8,),
        "group_scale": (torch.uint8,),
        "group_zero": (torch.uint8,),
        "row_scale": (torch.float32,),
    },
    **{name: {BLOCKS_PART: (torch.uint8,)} for name in BLOCK_FORMATS},
}


class WeightSource(Protocol):
    """Where a model's device weights come from; names are the canonical ones (DeepSeek-V3's on the hub)."""

    def linear(self, base: str, out_features: int, in_features: int) -> "LinearWeights":
        """The matrix `base`.weight in whatever format it is stored in. Raises InvalidInputError."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A norm, bias, router or embedding tensor. Raises InvalidInputError if missing or misshapen."""


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """One matrix [out_features, in_features] in parts (see PARTS); every part has out_features rows.

    int8: w = row_scale * q.  int4: w = row_scale * (group_scale * q - group_zero), q the low nibble for even
    inputs and the high nibble for odd ones, rows padded to whole groups.  Block formats: ggml's rows.
    """

    name: str
    in_features: int
    format: str
    parts: dict[str, Tensor]

    def __post_init__(self) -> None:
        if set(self.parts) != set(PARTS[self.format]):
            expected = ", ".join(PARTS[self.format])
            raise InvalidInputError(
                f"{self.name}: {self.format} needs {expected}, got {', '.join(self.parts)}"
            )
        check_sum_inputs(self.name, self.format, self.in_features)
        for suffix, part in self.parts.items():
            allowed = _DTYPES[self.format][suffix]
            if part.dtype not in allowed:
                expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
                raise InvalidInputError(f"{self.name}.{suffix}: expected {expected}, got {part.dtype}")
            self._check_shape(suffix, part)

    def _check_shape(self, suffix: str, part: Tensor) -> None:
        rows = next(iter(self.parts.values())).shape[0]
        if suffix == "row_scale":
            expected: tuple[int, ...] = (rows,)
        elif self.is_blocks:
            expected = (rows, BLOCK_FORMATS[self.format].row_bytes(self.in_features) or 0)
        elif self.format != "int4":
            expected = (rows, self.in_features)
        elif suffix == "qweight":
            expected = (rows, self.parts["group_scale"].shape[-1] * self.group_size // 2)
        else:
            expected = (rows, -(-self.in_features // self.group_size))
        if tuple(part.shape) != expected:
            raise InvalidInputError(
                f"{self.name}.{suffix}: expected shape {expected}, got {tuple(part.shape)}"
            )

    @property
    def is_blocks(self) -> bool:
        return self.format in BLOCK_FORMATS

    @property
    def out_features(self) -> int:
        return next(iter(self.parts.values())).shape[0]

    @property
    def group_size(self) -> int:
        """Inputs per group of an int4 matrix; 0 for the other formats."""
        if self.format != "int4":
            return 0
        groups = max(self.parts["group_scale"].shape[-1], 1)
        return self.parts["qweight"].shape[-1] * 2 // groups

    @property
    def kind(self) -> tuple[str, int, tuple[torch.dtype, ...]]:
        """Matrices of one kind and the same inputs can be stacked into one."""
        return self.format, self.group_size, tuple(part.dtype for part in self.parts.values())

    def rows(self, order: Tensor) -> "LinearWeights":
        """The same matrix with its rows taken in `order`."""
        parts = {suffix: part.index_select(0, order) for suffix, part in self.parts.items()}
        return LinearWeights(self.name, self.in_features, self.format, parts)

    def dequantized(self) -> Tensor:
        """[out_features, in_features]: float32 for a quantised matrix, else the tensor as stored."""
        if self.format == "float":
            return self.parts["weight"]
        if self.is_blocks:
            return dequantized(self.format, self.parts[BLOCKS_PART])
        row_scale = self.parts["row_scale"][:, None]
        if self.format == "int8":
            return self.parts["qweight"].to(torch.float32) * row_scale
        packed = self.parts["qweight"]
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1)
        q = nibbles.view(self.out_features, -1, self.group_size).to(torch.float32)
        scale, zero = (
            self.parts[part].to(torch.float32)[..., None] for part in ("group_scale", "group_zero")
        )
        w = (q * scale - zero).view(self.out_features, -1)[:, : self.in_features]
        return (w * row_scale).contiguous()


def is_summed_in_int32(format_name: str) -> bool:
    """Whether rows of this format (of a shard or pack) are summed in int32 from end to end."""
    return format_name.startswith("int")


def check_sum_inputs(what: object, format_name: str, inputs: int) -> None:
    """Raises InvalidInputError for more inputs than an int32 sum holds."""
    if inputs > MAX_SUM_INPUTS and is_summed_in_int32(format_name):
        raise InvalidInputError(
            f"{what}: {inputs} inputs in {format_name}, whose int32 sums hold at most {MAX_SUM_INPUTS};"
            " use bf16"
        )


def stack(matrices: list[LinearWeights]) -> LinearWeights:
    """One matrix whose outputs are those of `matrices` (same kind, same inputs), one after the other."""
    first = matrices[0]
    parts = {suffix: torch.cat([m.parts[suffix] for m in matrices]) for suffix in first.parts}
    return LinearWeights(" + ".join(m.name for m in matrices), first.in_features, first.format, parts)
