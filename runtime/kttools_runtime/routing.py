"""Which experts a token goes to: the exact native router, then (when there is one) an expert table."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .config import ModelConfig

# Added to the sum of the chosen scores before dividing, as in DeepSeek-V3's own code.
NORM_EPS = 1e-20


class LayerTable(Protocol):
    """Decides which of a token's native choices are computed in one layer."""

    def select(self, expert_ids: Tensor, expert_weights: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64 [num_tokens, k] best first, weights and biased scores float32 -> ids and weights of at
        most k choices, a dropped id being -1."""


class SigmoidGroupRouter:
    """DeepSeek-V3's router (arXiv 2412.19437, 2.1.2; config kind "sigmoid_bias_groups"), all in float32.

    A group's score is the sum of its two best biased scores; the best topk_group groups take part. The bias
    chooses; the weights are the unbiased sigmoid scores of the chosen, normalised if norm_topk_prob, times
    routed_scaling_factor. With fewer experts than num_experts_per_tok, the first of the native choice are
    kept.
    """

    __slots__ = ("bias", "config", "num_experts", "table", "weight")

    def __init__(
        self, config: ModelConfig, weight: Tensor, bias: Tensor, num_experts: int | None = None
    ) -> None:
        self.config = config
        self.weight = weight
        self.bias = bias
        self.num_experts = config.num_experts_per_tok if num_experts is None else num_experts
        self.table: LayerTable | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden_size] float32 -> ids int64 and weights float32, both [T, num_experts]."""
        scores = functional.linear(x, self.weight).sigmoid_()
        best = self._limit_groups(scores + self.bias).topk(self.num_experts, dim=-1)
        expert_ids = best.indices
        weights = scores.gather(1, expert_ids)
        if self.config.norm_topk_prob:
            weights /= weights.sum(dim=-1, keepdim=True).add_(NORM_EPS)
        weights *= self.config.routed_scaling_factor
        if self.table is None:
            return expert_ids, weights
        return self.table.select(expert_ids, weights, best.values)

    def _limit_groups(self, choice: Tensor) -> Tensor:
        """`choice` [num_tokens, n_routed_experts] with minus infinity outside the best topk_group groups."""
        config = self.config
        if config.topk_group == config.n_group:
            return choice
        grouped = choice.view(choice.shape[0], config.n_group, -1)
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        best = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
        is_left_out = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill_(is_left_out.unsqueeze(-1), -torch.inf).view_as(choice)
