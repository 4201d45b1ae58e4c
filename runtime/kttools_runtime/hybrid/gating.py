"""What stands between and behind an expert's matrices on a device: its gate, and biases if there are any."""

import torch
from torch import Tensor
from torch.nn import functional

from kttools_runtime.config import ModelConfig
from kttools_runtime.weights import WeightSource


class Gating:
    """silu(gate) * up, or gpt-oss's clamped gate (config swiglu_alpha, swiglu_limit) with biases.

    gate_up_bias: [n_routed_experts, 2 I], down_bias: [n_routed_experts, H], float32 on the device, or None.
    Experts are named by one number for all rows, or by a tensor with one for each row.
    """

    __slots__ = ("alpha", "down_bias", "gate_up_bias", "limit")

    def __init__(
        self,
        alpha: float | None = None,
        limit: float | None = None,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        self.alpha, self.limit = alpha, limit
        self.gate_up_bias, self.down_bias = gate_up_bias, down_bias

    def inner(self, both: Tensor, experts: int | Tensor) -> Tensor:
        """both: float32 [rows, 2 I], gate and up of each row -> [rows, I]."""
        gate, up = _plus(both, self.gate_up_bias, experts).chunk(2, dim=-1)
        if self.alpha is None or self.limit is None:
            return functional.silu(gate).mul_(up)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return torch.sigmoid(self.alpha * gate).mul_(gate).mul_(up + 1)

    def outer(self, rows: Tensor, experts: int | Tensor) -> Tensor:
        """rows: float32 [rows, H], what the down matrix gave."""
        return _plus(rows, self.down_bias, experts)


def _plus(rows: Tensor, bias: Tensor | None, experts: int | Tensor) -> Tensor:
    if bias is None:
        return rows
    return rows + (bias[experts] if isinstance(experts, int) else bias.index_select(0, experts))


def read_gating(config: ModelConfig, source: WeightSource, layer: int, device: torch.device) -> Gating:
    """Of one MoE layer; the biases of all its experts go to the device. Raises what reading raises."""
    if not config.expert_bias:
        return Gating(config.swiglu_alpha, config.swiglu_limit)
    count, inner = config.n_routed_experts, config.moe_intermediate_size
    prefix = f"model.layers.{layer}.mlp.experts."
    gate, up = (source.tensor(f"{prefix}{name}_proj_bias", (count, inner)) for name in ("gate", "up"))
    down = source.tensor(f"{prefix}down_proj_bias", (count, config.hidden_size))
    both = torch.cat((gate, up), dim=1).to(device, torch.float32)
    return Gating(config.swiglu_alpha, config.swiglu_limit, both, down.to(device, torch.float32))
