"""A mixture-of-experts layer: router and shared experts on the device, routed experts in the CPU engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .config import ModelConfig
from .linear import Placement
from .mlp import GatedMLP
from .routing import make_router


class ExpertLayer(Protocol):
    """The routed experts of one layer, as `kttools_runtime.experts` provides them."""

    @property
    def num_experts(self) -> int:
        """How many."""

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """x [T, H] bf16 or f32, ids int64 [T, k] (-1: none), weights f32 [T, k] -> f32 [T, H]."""

    def make_resident(self, expert: int) -> None:
        """Bring an expert's weights into memory."""


Watch = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """An expert layer and the dtype of its input; bf16 experts compute in the dtype they are given."""

    layer: ExpertLayer
    input_dtype: torch.dtype


class SharedExpert:
    """What every token goes through, times sigmoid(w x) where the config has shared_expert_gate."""

    __slots__ = ("gate", "mlp")

    def __init__(self, config: ModelConfig, placement: Placement, prefix: str) -> None:
        hidden_size = config.hidden_size
        name = f"{prefix}.shared_experts"
        self.mlp = GatedMLP(placement, name, hidden_size, config.shared_intermediate_size)
        self.gate: Tensor | None = None
        if config.shared_expert_gate:
            gate = placement.source.tensor(f"{prefix}.shared_expert_gate.weight", (1, hidden_size))
            self.gate = gate.to(device=placement.device, dtype=torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        out = self.mlp(x)
        return out if self.gate is None else out.mul_(functional.linear(x, self.gate).sigmoid_())


class MoELayer:
    """sum of the routed experts + the shared ones; x [num_tokens, hidden_size] float32 -> the same shape.

    watch: is shown what goes to the experts, x and the ids and weights that are computed; None: nobody looks.
    """

    __slots__ = ("experts", "router", "shared", "watch")

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        prefix: str,
        experts: RoutedExperts,
        num_experts: int | None = None,
    ) -> None:
        shape = (config.n_routed_experts, config.hidden_size)
        weight = placement.source.tensor(f"{prefix}.gate.weight", shape)
        weight = weight.to(device=placement.device, dtype=torch.float32)
        bias = None
        if config.router == "sigmoid_bias_groups":
            bias = placement.vector(f"{prefix}.gate.e_score_correction_bias", config.n_routed_experts)
        logit_bias = None
        if config.router_bias:
            logit_bias = placement.vector(f"{prefix}.gate.bias", config.n_routed_experts)
        self.router = make_router(config, weight, bias, num_experts, logit_bias)
        self.experts = experts
        self.watch: Watch | None = None
        self.shared: SharedExpert | None = None
        if config.n_shared_experts:
            self.shared = SharedExpert(config, placement, prefix)

    def __call__(self, x: Tensor) -> Tensor:
        expert_ids, weights = self.router(x)
        if self.watch is not None:
            self.watch(x, expert_ids, weights)
        rows = x if x.shape[0] == 1 else x.to(self.experts.input_dtype)  # one token: as in PackedCpuLinear
        if x.is_cpu:
            routed = self.experts.layer.forward(rows, expert_ids, weights)
        else:
            routed = self.experts.layer.forward(rows.cpu(), expert_ids.cpu(), weights.cpu()).to(x.device)
        return routed if self.shared is None else routed.add_(self.shared(x))
