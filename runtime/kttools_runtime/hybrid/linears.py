"""Linears on a device, straight from a shard's codes: packed int4, int8, or bfloat16.

GGUF's blocks become int8. int4 of a shard is row_scale * (s q - z) with small integers s and z. They are
exact in bfloat16, so that the packed product (torch's own, which takes a scale and a zero for each group) sees the
true weights, and the row's float32 scale is applied to its result.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kttools_runtime import _kernels, env
from kttools_runtime.block_formats import BLOCKS_PART, dequantized
from kttools_runtime.errors import UsageError
from kttools_runtime.linear import Linear, TorchLinear
from kttools_runtime.weights import LinearWeights

# Rows from which an int4 or int8 matrix is expanded to bf16 once for a matrix product: a packed kernel reads
# it for a few rows at a time, and a product of many is bound by arithmetic. An assumption, not measured.
DENSE_ROWS = 128
# Of a matrix expanded at a time: the largest of DeepSeek-V3's attention is 470 MB.
EXPANDED_BYTES = 64 << 20
KINDS = ("auto", "packed", "triton", "dense")
# _weight_int4pack_mm: inner tiles of 16 inputs, columns of a tile.
INNER_K_TILES = 8
PACKED_ROWS = {"cpu": 16, "cuda": 8}


def expand_int4(qweight: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., N, K / 2], [..., N, G] twice -> [..., N, K] of s q - z, exact in any float dtype."""
    low, high = qweight & 15, qweight >> 4
    q = torch.stack((low, high), dim=-1).flatten(-2).unflatten(-1, (scale.shape[-1], -1))
    return (q.to(dtype) * scale[..., None].to(dtype)).sub_(zero[..., None].to(dtype)).flatten(-2)


class PackedInt4Linear:
    """torch's packed int4 product; x [num_tokens, K] float32 -> [num_tokens, N] float32."""

    __slots__ = (
        "bias",
        "dtype",
        "group_size",
        "in_features",
        "out_features",
        "packed",
        "row_scale",
        "scales",
    )

    def __init__(
        self, matrix: LinearWeights, device: torch.device, dtype: torch.dtype, bias: Tensor | None
    ) -> None:
        self.dtype = dtype
        self.bias = bias
        self.in_features, self.out_features = matrix.in_features, matrix.out_features
        self.group_size = matrix.group_size
        self.row_scale = matrix.parts["row_scale"].to(device)
        low, high = matrix.parts["qweight"] & 15, matrix.parts["qweight"] >> 4
        unit = PACKED_ROWS[device.type]
        rows = -(-self.out_features // unit) * unit - self.out_features
        if device.type == "cpu":
            codes = functional.pad(torch.stack((low, high), -1).flatten(1).to(torch.int32), (0, 0, 0, rows))
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER_K_TILES)
        else:  # takes pairs with the even input in the high nibble
            pairs = functional.pad(low << 4 | high, (0, 0, 0, rows)).to(device)
            self.packed = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_K_TILES)
        scale, zero = (matrix.parts[name].to(torch.int16) for name in ("group_scale", "group_zero"))
        both = torch.stack((scale, 8 * scale - zero), dim=-1)  # the kernel computes (q - 8) scale + zero
        both = functional.pad(both, (0, 0, 0, 0, 0, rows))
        self.scales = both.transpose(0, 1).to(device, dtype).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        padded = self.scales.shape[0] * self.group_size
        x = x.to(self.dtype)
        if padded != self.in_features:
            x = functional.pad(x, (0, padded - self.in_features))
        op = torch.ops.aten._weight_int4pack_mm_for_cpu if x.is_cpu else torch.ops.aten._weight_int4pack_mm
        out = op(x.contiguous(), self.packed, self.group_size, self.scales)
        out = out[:, : self.out_features].to(torch.float32) * self.row_scale
        return out if self.bias is None else out.add_(self.bias)

    @staticmethod
    def takes(matrix: LinearWeights, device: torch.device) -> bool:
        padded = matrix.parts["group_scale"].shape[-1] * matrix.group_size
        return device.type == "cpu" or padded % (16 * INNER_K_TILES) == 0


class CodesLinear:
    """int8 or int4 codes as the shard has them: expanded for many rows, or through our Triton kernel."""

    __slots__ = ("bias", "dtype", "in_features", "is_triton", "parts", "row_scale")

    def __init__(
        self,
        matrix: LinearWeights,
        device: torch.device,
        dtype: torch.dtype,
        bias: Tensor | None,
        is_triton: bool,
    ) -> None:
        self.dtype = dtype
        self.bias = bias
        self.in_features = matrix.in_features
        self.is_triton = is_triton
        self.parts = {name: part.to(device).contiguous() for name, part in matrix.parts.items()}
        self.row_scale = self.parts.pop("row_scale")

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.is_triton and x.shape[0] < DENSE_ROWS:
            from .triton_kernels import codes_matmul

            out = codes_matmul(x, self.parts, self.row_scale)
        else:
            out = self._expanded_product(x)
        return out if self.bias is None else out.add_(self.bias)

    def _expanded_product(self, x: Tensor) -> Tensor:
        """With the codes expanded some rows at a time: the head of DeepSeek-V3 alone is 1.9 GB in bf16."""
        rows = len(self.row_scale)
        step = max(1, EXPANDED_BYTES // (self.in_features * self.dtype.itemsize))
        out = torch.empty(x.shape[0], rows, device=x.device)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            product = functional.linear(x, self._expanded(part)).to(torch.float32)
            torch.mul(product, self.row_scale[part], out=out[:, part])
        return out

    def _expanded(self, rows: slice) -> Tensor:
        """[rows, K] without the rows' scales: integers of at most 8 bits, exact in bfloat16."""
        if len(self.parts) == 1:
            return self.parts["qweight"][rows].to(self.dtype)
        q, scale, zero = (self.parts[name][rows] for name in ("qweight", "group_scale", "group_zero"))
        return expand_int4(q, scale, zero, self.dtype)[:, : self.in_features]


def as_int8(matrix: LinearWeights) -> LinearWeights:
    """A matrix of blocks as int8 with a scale for each row: half of bfloat16, and kernels for it exist.

    Some rows at a time, so that no whole matrix is ever held in float32.
    """
    step = max(1, EXPANDED_BYTES // (4 * matrix.in_features))
    codes = torch.empty(matrix.out_features, matrix.in_features, dtype=torch.int8)
    row_scale = torch.empty(matrix.out_features)
    for first in range(0, matrix.out_features, step):
        rows = slice(first, first + step)
        values = dequantized(matrix.format, matrix.parts[BLOCKS_PART][rows])
        codes[rows], row_scale[rows] = map(torch.from_numpy, _kernels.quantize_int8(values.numpy()))
    return LinearWeights(matrix.name, matrix.in_features, "int8", {"qweight": codes, "row_scale": row_scale})


def linear_maker(
    device: torch.device, dtype: torch.dtype
) -> Callable[[LinearWeights, Tensor | None], Linear]:
    """Makes the linears of one device. KTTOOLS_DEVICE_LINEAR forces a kind.

    float32: the dequantised matrix, the reference. Raises UsageError for an unknown kind, or Triton where
    there is none.
    """
    kind = env.device_linear()
    if kind not in KINDS:
        raise UsageError(f"KTTOOLS_DEVICE_LINEAR must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "triton":
        from .triton_kernels import require_triton

        require_triton()

    def make(matrix: LinearWeights, bias: Tensor | None) -> Linear:
        if matrix.format == "float" or dtype == torch.float32 or kind == "dense":
            return TorchLinear(matrix.dequantized().to(device=device, dtype=dtype), bias)
        if matrix.is_blocks:
            matrix = as_int8(matrix)
        is_packed = matrix.format == "int4" and PackedInt4Linear.takes(matrix, device)
        chosen = kind if kind != "auto" else _fastest(matrix.format, is_packed, device)
        if chosen == "packed" and is_packed:
            return PackedInt4Linear(matrix, device, dtype, bias)
        return CodesLinear(matrix, device, dtype, bias, chosen == "triton")

    return make


def _fastest(form: str, is_packed: bool, device: torch.device) -> str:
    """ "packed", "triton" or "codes": measured once a process on CUDA, with one row of a square matrix."""
    if device.type != "cuda":
        return "packed" if is_packed else "codes"
    from .triton_kernels import has_triton

    if form == "int8" or not is_packed:
        return "triton" if has_triton() else "codes"
    return _measured_int4(device) if has_triton() else "packed"


@functools.cache
def _measured_int4(device: torch.device) -> str:
    """The faster of torch's packed product and our kernel for one row of [4096, 4096] on this device."""
    size, group = 4096, 64
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (size, size // 2), dtype=torch.uint8, generator=generator)
    ones = torch.ones(size, size // group, dtype=torch.uint8)
    parts = {"qweight": codes, "group_scale": ones, "group_zero": 8 * ones, "row_scale": torch.ones(size)}
    matrix = LinearWeights("measured", size, "int4", parts)
    x = torch.ones(1, size, device=device)
    candidates: dict[str, Linear] = {
        "packed": PackedInt4Linear(matrix, device, torch.bfloat16, None),
        "triton": CodesLinear(matrix, device, torch.bfloat16, None, True),
    }
    return min(candidates, key=lambda name: _milliseconds(candidates[name], x))


def _milliseconds(linear: Linear, x: Tensor) -> float:
    for _ in range(3):
        linear(x)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        linear(x)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
