"""Hot experts: some of a layer's experts on the device (their codes: hot_codes.py). The engine gets -1 for
their ids and never touches their pages."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kttools_runtime.errors import UnsupportedModelError
from kttools_runtime.weights import LinearWeights

from .gating import Gating
from .linears import expand_int4
from .untile import ExpertCodes

PLAIN = Gating()


def expanded(matrix: LinearWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(W [..., N, K], row scales [..., N] or None): exact integers in bf16 for int8 and int4 codes."""
    parts = matrix.parts
    if matrix.format == "float":
        return parts["weight"].to(dtype), None
    if matrix.format == "int8":
        return parts["qweight"].to(dtype), parts["row_scale"]
    whole = expand_int4(parts["qweight"], parts["group_scale"], parts["group_zero"], dtype)
    return whole[..., : matrix.in_features], parts["row_scale"]


def product(x: Tensor, matrix: LinearWeights, dtype: torch.dtype) -> Tensor:
    """x [T, K] -> float32 [T, N]."""
    weight, scale = expanded(matrix, dtype)
    out = functional.linear(x.to(dtype), weight).to(torch.float32)
    return out if scale is None else out.mul_(scale)


def gated(
    x: Tensor, codes: ExpertCodes, dtype: torch.dtype, gating: Gating = PLAIN, expert: int = 0
) -> Tensor:
    """One expert: x [T, H] -> float32 [T, H]. expert: whose biases gating adds."""
    inner = gating.inner(product(x, codes.gate_up, dtype), expert)
    return gating.outer(product(inner, codes.down, dtype), expert)


class ExpertSum:
    """float32 [T, H] `out`: the sum of what experts add, one after the other.

    ids [T, k] as the router gave them (-1: none) and weights are on x's device; they are read back from it
    once, so that adding an expert asks the device nothing.
    """

    def __init__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        num_experts: int,
        dtype: torch.dtype,
        gating: Gating = PLAIN,
    ) -> None:
        self.x, self.dtype, self.k = x, dtype, ids.shape[1]
        self.gating = gating
        self.out = torch.zeros(x.shape[0], x.shape[1], device=x.device)
        flat = ids.flatten()
        self._order = flat.argsort(stable=True)
        self._weights = weights.flatten()
        self._ends = torch.bincount(flat + 1, minlength=num_experts + 1).cumsum(0).tolist()

    def add(self, expert: int, codes: ExpertCodes) -> None:
        chosen = self._order[self._ends[expert] : self._ends[expert + 1]]
        if len(chosen):
            rows = chosen // self.k
            product = gated(self.x[rows], codes, self.dtype, self.gating, expert)
            self.out.index_add_(0, rows, product * self._weights[chosen, None])


class HotExperts:
    """The device's experts of one layer. slot_of: int64 [n_routed_experts], -1 for those of the CPU."""

    def __init__(
        self,
        codes: Mapping[int, ExpertCodes],
        num_experts: int,
        device: torch.device,
        dtype: torch.dtype,
        is_triton: bool = False,
        gating: Gating = PLAIN,
    ) -> None:
        """codes: of each hot expert, all of one kind, on the device."""
        self.gating = gating
        self.experts = tuple(codes)
        self.dtype = dtype
        self.is_triton = is_triton
        slots = torch.full((num_experts,), -1, dtype=torch.int64)
        slots[list(self.experts)] = torch.arange(len(self.experts))
        self.slot_of = slots.to(device)
        self.gate_up = _stacked([c.gate_up for c in codes.values()])
        self.down = _stacked([c.down for c in codes.values()])

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for m in (self.gate_up, self.down) for p in m.values()) + self.slot_of.nbytes

    def slots(self, ids: Tensor) -> Tensor:
        """The slot of every id, -1 for experts of the CPU and for ids of -1."""
        return torch.where(ids < 0, -1, self.slot_of[ids.clamp(min=0)])

    def without(self, ids: Tensor) -> Tensor:
        """ids with those of the device replaced by -1."""
        return torch.where(self.slots(ids) < 0, ids, -1)

    def chunk(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Many tokens, grouped by expert."""
        total = ExpertSum(x, ids, weights, len(self.slot_of), self.dtype, self.gating)
        for slot, expert in enumerate(self.experts):
            total.add(expert, self._codes(slot))
        return total.out

    def one(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One token without asking the device anything: x [1, H], ids and weights [1, k] -> [1, H].

        On CUDA our Triton kernel reads the chosen slots alone. Elsewhere torch gathers them.
        """
        slots = self.slots(ids)[0]
        shares = torch.where(slots < 0, 0.0, weights[0])
        experts = ids[0].clamp(min=0)
        if self.is_triton:
            from .triton_kernels import slots_product

            inner = self.gating.inner(slots_product(x.to(self.dtype), self.gate_up, slots), experts)
            rows = slots_product(inner.to(self.dtype), self.down, slots)
        else:
            own = slots.clamp(min=0)
            inner = self.gating.inner(self._gathered(x.expand(len(own), -1), self.gate_up, own), experts)
            rows = self._gathered(inner, self.down, own)
        return (self.gating.outer(rows, experts) * shares[:, None]).sum(dim=0, keepdim=True)

    def _codes(self, slot: int) -> ExpertCodes:
        sides = []
        for stacked in (self.gate_up, self.down):
            parts = {name: part[slot] for name, part in stacked.items()}
            sides.append(LinearWeights("expert", self._inputs(stacked), form_of(stacked), parts))
        return ExpertCodes(*sides)

    def _inputs(self, stacked: dict[str, Tensor]) -> int:
        if stacked is self.gate_up:
            return next(iter(self.down.values())).shape[1]
        return next(iter(self.gate_up.values())).shape[1] // 2

    def _gathered(self, x: Tensor, stacked: dict[str, Tensor], slots: Tensor) -> Tensor:
        """x [k, K], a row for each slot -> float32 [k, N]."""
        parts = {name: part.index_select(0, slots) for name, part in stacked.items()}
        if "weight" in parts:
            weight, scale = parts["weight"].to(self.dtype), None
        elif "group_scale" in parts:
            names = ("qweight", "group_scale", "group_zero")
            q, group_scale, zero = (parts[name] for name in names)
            weight = expand_int4(q, group_scale, zero, self.dtype)[..., : x.shape[1]]
            scale = parts["row_scale"]
        else:
            weight, scale = parts["qweight"].to(self.dtype), parts["row_scale"]
        out = torch.bmm(weight, x.to(self.dtype)[..., None])[..., 0].to(torch.float32)
        return out if scale is None else out * scale


def form_of(parts: dict[str, Tensor]) -> str:
    """The format of weights.PARTS that has these parts."""
    return "float" if "weight" in parts else "int4" if "group_scale" in parts else "int8"


def _stacked(matrices: Sequence[LinearWeights]) -> dict[str, Tensor]:
    if len({matrix.kind for matrix in matrices}) != 1:
        raise UnsupportedModelError("hot experts of one layer must have one format: quantize with one format")
    return {name: torch.stack([m.parts[name] for m in matrices]) for name in matrices[0].parts}
