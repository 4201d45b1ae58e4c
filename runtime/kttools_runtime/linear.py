"""Linear layers: one interface, an implementation per device and stored format.

Everything outside a linear is float32. What a linear rounds is its own input: to bfloat16 for a bf16 matrix,
to int8 per token for int8 and int4 ones (inside the kernel; for GGUF's blocks and few tokens per 256 inputs),
to nothing on the float32 reference path.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .block_formats import BLOCKS_PART
from .mempolicy import interleaved
from .weights import LinearWeights, WeightSource, stack


class Linear(Protocol):
    """x [num_tokens, in_features] float32 -> [num_tokens, out_features] float32, a new tensor."""

    def __call__(self, x: Tensor) -> Tensor: ...


class TorchLinear:
    """A matrix in float32 or bfloat16 on any device, multiplied by torch."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out = functional.linear(x.to(self.weight.dtype), self.weight).to(torch.float32)
        return out if self.bias is None else out.add_(self.bias)


class PackedCpuLinear:
    """A matrix repacked for this CPU's kernels; the result does not depend on the number of threads."""

    __slots__ = ("bias", "is_bf16", "out_features", "packed")

    def __init__(self, packed: Any, is_bf16: bool, bias: Tensor | None = None) -> None:
        self.packed = packed
        self.is_bf16 = is_bf16
        self.out_features: int = packed.out_features
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        # One token is bound by the weights' bytes: float32 input costs nothing there and saves a conversion.
        if self.is_bf16 and x.shape[0] > 1:
            rows = x.to(torch.bfloat16).contiguous().view(torch.uint16)
        else:
            rows = x.contiguous()
        out = torch.empty(x.shape[0], self.out_features)
        self.packed.forward(rows.numpy(), out.numpy())
        return out if self.bias is None else out.add_(self.bias)


class LinearGroup:
    """Linears on the same input, run as one matrix where their formats allow it."""

    __slots__ = ("linears", "sizes")

    def __init__(self, linears: list[Linear], sizes: list[int]) -> None:
        self.linears = linears
        self.sizes = sizes

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """[num_tokens, size] for each size: views of one tensor when the matrices are stacked."""
        if len(self.linears) == 1:
            return self.linears[0](x).split_with_sizes(self.sizes, dim=-1)
        return [linear(x) for linear in self.linears]


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One matrix to fetch: name without ".weight", outputs, whether `base`.bias exists, row order."""

    base: str
    out_features: int
    has_bias: bool = False
    row_order: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Fetches weights and puts them on a device in the dtype of the matrix products.

    dtype: float32 (reference: nothing is rounded) or bfloat16. pool: the CPU kernels' thread pool, or None to
    leave every product to torch. make_linear: makes a device's linears of a matrix and its bias.
    """

    source: WeightSource
    device: torch.device
    dtype: torch.dtype
    pool: Any = None
    make_linear: Callable[[LinearWeights, Tensor | None], Linear] | None = None

    @property
    def uses_cpu_kernels(self) -> bool:
        return self.pool is not None and self.device.type == "cpu" and self.dtype == torch.bfloat16

    def vector(self, name: str, size: int) -> Tensor:
        """float32 [size]: a norm weight or a bias."""
        return self.source.tensor(name, (size,)).to(device=self.device, dtype=torch.float32)

    def linear(self, spec: LinearSpec, in_features: int) -> Linear:
        return self._place(self._fetch(spec, in_features), self._bias([spec]))

    def group(self, specs: list[LinearSpec], in_features: int) -> LinearGroup:
        """The matrices of `specs` on one input, stacked when they are of one kind."""
        sizes = [spec.out_features for spec in specs]
        matrices = [self._fetch(spec, in_features) for spec in specs]
        if len({matrix.kind for matrix in matrices}) == 1:
            return LinearGroup([self._place(stack(matrices), self._bias(specs))], sizes)
        placed = [self._place(m, self._bias([s])) for m, s in zip(matrices, specs, strict=True)]
        return LinearGroup(placed, sizes)

    def matrix(self, spec: LinearSpec, in_features: int) -> Tensor:
        """[out_features, in_features] dequantised, on the CPU, in the stored float type or float32."""
        return self._fetch(spec, in_features).dequantized()

    def _fetch(self, spec: LinearSpec, in_features: int) -> LinearWeights:
        matrix = self.source.linear(spec.base, spec.out_features, in_features)
        return matrix if spec.row_order is None else matrix.rows(spec.row_order)

    def _bias(self, specs: list[LinearSpec]) -> Tensor | None:
        if not any(spec.has_bias for spec in specs):
            return None
        return torch.cat([self._one_bias(spec) for spec in specs])

    def _one_bias(self, spec: LinearSpec) -> Tensor:
        if not spec.has_bias:
            return torch.zeros(spec.out_features, device=self.device)
        bias = self.vector(f"{spec.base}.bias", spec.out_features)
        return bias if spec.row_order is None else bias[spec.row_order.to(self.device)]

    def _place(self, matrix: LinearWeights, bias: Tensor | None) -> Linear:
        if self.make_linear is not None:
            return self.make_linear(matrix, bias)
        if self.uses_cpu_kernels:
            return PackedCpuLinear(_pack(matrix, self.pool), matrix.format == "float", bias)
        return TorchLinear(matrix.dequantized().to(device=self.device, dtype=self.dtype), bias)


def _pack(matrix: LinearWeights, pool: Any) -> Any:
    """The kernels' own copy of a matrix, over all memory nodes; the stored one is released by the caller."""
    with interleaved(pool.nodes):
        return _packed(matrix, pool)


def _packed(matrix: LinearWeights, pool: Any) -> Any:
    from ._kernels import PackedLinear

    parts = {suffix: part.contiguous() for suffix, part in matrix.parts.items()}
    if matrix.format == "float":
        return PackedLinear.from_bf16(pool, parts["weight"].to(torch.bfloat16).view(torch.uint16).numpy())
    if matrix.format == "int8":
        return PackedLinear.from_int8(pool, parts["qweight"].numpy(), parts["row_scale"].numpy())
    if matrix.is_blocks:
        return PackedLinear.from_blocks(pool, matrix.format, parts[BLOCKS_PART].numpy(), matrix.in_features)
    q, scale, zero, row = (
        parts[suffix].numpy() for suffix in ("qweight", "group_scale", "group_zero", "row_scale")
    )
    return PackedLinear.from_int4(pool, q, scale, zero, row, matrix.in_features, matrix.group_size)
