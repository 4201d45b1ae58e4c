"""Linears on a device, straight from a shard's codes: packed int4, int8, or bfloat16.

GGUF's blocks become int8. int4 of a shard is row_scale * (s q - z) with small integers s and z. They are
exact in bfloat16, so that the packed product (torch's own, which takes a scale and a zero for each group)
sees the true weights, and the row's float32 scale is applied to its result.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kttools_runtime import _kernels, env
from kttools_runtime.block_formats import BLOCKS_PART, dequantized
from kttools_runtime.device_footprint import EXPANDED_BYTES
from kttools_runtime.errors import HardwareError, UsageError
from kttools_runtime.linear import Linear, TorchLinear
from kttools_runtime.weights import LinearWeights

from .packed_layout import INNER_K_TILES, pack_codes, packed_layout, whole_rows

# Rows from which an int4 or int8 matrix is expanded to bf16 for a matrix product: a packed kernel reads it
# for a few rows at a time, and a product of many is bound by arithmetic. On CUDA measured once a process.
DENSE_ROWS = 128
TRIED_ROWS = (16, 32, 64, 128, 256, 512, 1024)
PROBE_SIZE = 4096
KINDS = ("auto", "packed", "triton", "dense")


def expand_int4(qweight: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., N, K / 2], [..., N, G] twice -> [..., N, K] of s q - z, exact in any float dtype."""
    low, high = qweight & 15, qweight >> 4
    q = torch.stack((low, high), dim=-1).flatten(-2).unflatten(-1, (scale.shape[-1], -1))
    return (q.to(dtype) * scale[..., None].to(dtype)).sub_(zero[..., None].to(dtype)).flatten(-2)


def expanded_product(x: Tensor, row_scale: Tensor, unit: int, expand: Callable[[int, int], Tensor]) -> Tensor:
    """x [T, K] times a matrix that is expanded some rows at a time -> float32 [T, N].

    expand(first, last): rows of it without their scales, integers of at most 8 bits, in x's dtype; the range
    is in whole units. The head of DeepSeek-V3 alone is 1.9 GB in bf16.
    """
    rows = len(row_scale)
    step = max(1, EXPANDED_BYTES // (x.shape[1] * x.dtype.itemsize) // unit) * unit
    out = torch.empty(x.shape[0], rows, device=x.device)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        weight = expand(first, -(-last // unit) * unit)[: last - first]
        torch.mul(functional.linear(x, weight), row_scale[first:last], out=out[:, first:last])
    return out


class PackedInt4Linear:
    """torch's packed int4 product; x [num_tokens, K] float32 -> [num_tokens, N] float32.

    From dense_rows rows on the packed matrix is expanded instead (where its layout is known).
    """

    __slots__ = (
        "bias",
        "dense_rows",
        "dtype",
        "group_size",
        "in_features",
        "layout",
        "out_features",
        "packed",
        "row_scale",
        "scales",
    )

    def __init__(
        self,
        matrix: LinearWeights,
        device: torch.device,
        dtype: torch.dtype,
        bias: Tensor | None,
        dense_rows: int = DENSE_ROWS,
    ) -> None:
        self.dtype = dtype
        self.bias = bias
        self.dense_rows = dense_rows
        self.in_features, self.out_features = matrix.in_features, matrix.out_features
        self.group_size = matrix.group_size
        self.row_scale = matrix.parts["row_scale"].to(device)
        pairs = whole_rows(matrix.parts["qweight"], device)
        self.packed = pack_codes(torch.stack((pairs & 15, pairs >> 4), -1).flatten(1), device)
        self.layout = packed_layout(device)
        scale, zero = (matrix.parts[name].to(torch.int16) for name in ("group_scale", "group_zero"))
        both = torch.stack((scale, 8 * scale - zero), dim=-1)  # the kernel computes (q - 8) scale + zero
        self.scales = whole_rows(both, device).transpose(0, 1).to(device, dtype).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        padded = self.scales.shape[0] * self.group_size
        x = x.to(self.dtype)
        if padded != self.in_features:
            x = functional.pad(x, (0, padded - self.in_features))
        if x.shape[0] >= self.dense_rows and self.layout is not None:
            out = expanded_product(x, self.row_scale, self.layout.rows, self._expanded)
        else:
            op = (
                torch.ops.aten._weight_int4pack_mm_for_cpu if x.is_cpu else torch.ops.aten._weight_int4pack_mm
            )
            out = op(x.contiguous(), self.packed, self.group_size, self.scales)
            out = out[:, : self.out_features].to(torch.float32) * self.row_scale
        return out if self.bias is None else out.add_(self.bias)

    def _expanded(self, first: int, last: int) -> Tensor:
        """(q - 8) scale + zero of these rows: every step is an integer of at most 8 bits, exact in bf16."""
        if self.layout is None:
            raise AssertionError("expanded without a layout")
        codes = self.layout.codes(self.packed, first, last, self.scales.shape[0] * self.group_size)
        scale, zero = self.scales[:, first:last].permute(2, 1, 0)[..., None]
        weight = codes.to(self.dtype).sub_(8).unflatten(1, (-1, self.group_size))
        return weight.mul_(scale).add_(zero).flatten(1)

    @staticmethod
    def takes(matrix: LinearWeights, device: torch.device) -> bool:
        padded = matrix.parts["group_scale"].shape[-1] * matrix.group_size
        return device.type == "cpu" or padded % (16 * INNER_K_TILES) == 0


class CodesLinear:
    """int8 or int4 codes as the shard has them: expanded for many rows, or through our Triton kernel."""

    __slots__ = ("bias", "dense_rows", "dtype", "in_features", "is_triton", "parts", "row_scale")

    def __init__(
        self,
        matrix: LinearWeights,
        device: torch.device,
        dtype: torch.dtype,
        bias: Tensor | None,
        is_triton: bool,
        dense_rows: int = DENSE_ROWS,
    ) -> None:
        self.dtype = dtype
        self.bias = bias
        self.in_features = matrix.in_features
        self.is_triton = is_triton
        self.dense_rows = dense_rows
        self.parts = {name: part.to(device).contiguous() for name, part in matrix.parts.items()}
        self.row_scale = self.parts.pop("row_scale")

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.is_triton and x.shape[0] < self.dense_rows:
            from .triton_kernels import codes_matmul

            out = codes_matmul(x, self.parts, self.row_scale)
        else:
            out = expanded_product(x, self.row_scale, 1, self._expanded)
        return out if self.bias is None else out.add_(self.bias)

    def _expanded(self, first: int, last: int) -> Tensor:
        if len(self.parts) == 1:
            return self.parts["qweight"][first:last].to(self.dtype)
        q, scale, zero = (self.parts[name][first:last] for name in ("qweight", "group_scale", "group_zero"))
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

    float32: the dequantised matrix, the reference. Raises UsageError for an unknown kind, HardwareError for
    Triton's where there is none or no GPU.
    """
    kind = env.device_linear()
    if kind not in KINDS:
        raise UsageError(f"KTTOOLS_DEVICE_LINEAR must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "triton":
        from .triton_kernels import require_triton

        require_triton()
        if device.type != "cuda":
            raise HardwareError("KTTOOLS_DEVICE_LINEAR=triton: its kernels need a CUDA device")

    def make(matrix: LinearWeights, bias: Tensor | None) -> Linear:
        if matrix.format == "float" or dtype == torch.float32 or kind == "dense":
            return TorchLinear(matrix.dequantized().to(device=device, dtype=dtype), bias)
        if matrix.is_blocks:
            matrix = as_int8(matrix)
        is_packed = matrix.format == "int4" and PackedInt4Linear.takes(matrix, device)
        chosen = kind if kind != "auto" else _fastest(matrix.format, is_packed, device)
        is_packed = is_packed and chosen == "packed"
        rows = _dense_rows(device, is_packed) if is_packed or chosen == "triton" else DENSE_ROWS
        if is_packed:
            return PackedInt4Linear(matrix, device, dtype, bias, rows)
        return CodesLinear(matrix, device, dtype, bias, chosen == "triton", rows)

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
    x = torch.ones(1, PROBE_SIZE, device=device)
    return min(
        ("packed", "triton"), key=lambda kind: _milliseconds(_probe_linear(device, kind == "packed", 2), x)
    )


@functools.cache
def _dense_rows(device: torch.device, is_packed: bool) -> int:
    """The least of TRIED_ROWS for which a matrix of [4096, 4096] is faster expanded than by its kernel."""
    if device.type != "cuda":
        return DENSE_ROWS
    for rows in TRIED_ROWS:
        x = torch.ones(rows, PROBE_SIZE, device=device)
        kernel, dense = (_milliseconds(_probe_linear(device, is_packed, r), x) for r in (rows + 1, rows))
        if dense < kernel:
            return rows
    return TRIED_ROWS[-1]


def _probe_linear(device: torch.device, is_packed: bool, dense_rows: int) -> Linear:
    size, group = PROBE_SIZE, 64
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (size, size // 2), dtype=torch.uint8, generator=generator)
    ones = torch.ones(size, size // group, dtype=torch.uint8)
    parts = {"qweight": codes, "group_scale": ones, "group_zero": 8 * ones, "row_scale": torch.ones(size)}
    matrix = LinearWeights("measured", size, "int4", parts)
    if is_packed:
        return PackedInt4Linear(matrix, device, torch.bfloat16, None, dense_rows)
    return CodesLinear(matrix, device, torch.bfloat16, None, True, dense_rows)


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
