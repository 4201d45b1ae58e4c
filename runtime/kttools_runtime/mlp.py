"""The gated feed-forward network: dense layers and shared experts."""

from torch import Tensor
from torch.nn import functional

from .linear import LinearSpec, Placement


class GatedMLP:
    """down_proj(silu(gate_proj(x)) * up_proj(x)); x [num_tokens, hidden_size] float32 -> the same shape."""

    __slots__ = ("down", "gate_up")

    def __init__(self, placement: Placement, prefix: str, hidden_size: int, intermediate_size: int) -> None:
        specs = [LinearSpec(f"{prefix}.{name}", intermediate_size) for name in ("gate_proj", "up_proj")]
        self.gate_up = placement.group(specs, hidden_size)
        self.down = placement.linear(LinearSpec(f"{prefix}.down_proj", hidden_size), intermediate_size)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        return self.down(functional.silu(gate).mul_(up))
