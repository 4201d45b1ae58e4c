"""Which experts a token goes to: the exact native router, then (when there is one) an expert table."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .config import ModelConfig

# Added to the sum of the chosen scores before dividing, as in DeepSeek-V3's own code; beside the sum of a
# softmax's best it is nothing.
NORM_EPS = 1e-20


class LayerTable(Protocol):
    """Decides which of a token's native choices are computed in one layer."""

    def select(self, expert_ids: Tensor, expert_weights: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64 [num_tokens, k] best first, weights and biased scores float32 -> ids and weights of at
        most k choices, a dropped id being -1."""


class Router:
    """What the routers of all kinds share: scores of every expert, group limit, best, weights. All float32.

    A subclass gives `_scores` (what the weights are made of), `_choice` (what is compared) and
    `_group_scores`. The weights of the chosen are normalised if norm_topk_prob, times routed_scaling_factor.
    With fewer experts than num_experts_per_tok, the first of the native choice are kept.
    """

    __slots__ = ("bias", "config", "logit_bias", "num_experts", "table", "weight")

    def __init__(
        self, config: ModelConfig, weight: Tensor, bias: Tensor | None = None, num_experts: int | None = None
    ) -> None:
        self.config = config
        self.weight = weight
        self.bias = bias
        self.logit_bias: Tensor | None = None
        self.num_experts = config.num_experts_per_tok if num_experts is None else num_experts
        self.table: LayerTable | None = None

    def native(self, engine: Any) -> Any:
        """The same choice in C++, without a table: that is given to it by call (LayerPolicy.native)."""
        from . import _kernels

        config = self.config
        bias, logit_bias = (None if each is None else each.numpy() for each in (self.bias, self.logit_bias))
        return _kernels.Router(
            engine,
            config.router,
            config.n_group,
            config.topk_group,
            self.num_experts,
            config.norm_topk_prob,
            config.routed_scaling_factor,
            self.weight.contiguous().numpy(),
            bias,
            logit_bias,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything the choice depends on."""
        parts = (self.weight, self.bias, self.logit_bias)
        return tuple(part for part in parts if part is not None)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden_size] float32 -> ids int64 and weights float32, both [T, num_experts]."""
        scores = self._scores(functional.linear(x, self.weight, self.logit_bias))
        best = self._limit_groups(self._choice(scores)).topk(self.num_experts, dim=-1)
        expert_ids = best.indices
        weights = scores.gather(1, expert_ids)
        if self.config.norm_topk_prob:
            weights /= weights.sum(dim=-1, keepdim=True).add_(NORM_EPS)
        weights *= self.config.routed_scaling_factor
        if self.table is None:
            return expert_ids, weights
        return self.table.select(expert_ids, weights, best.values)

    def _scores(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def _choice(self, scores: Tensor) -> Tensor:
        """A tensor of the same shape; it may be `scores` itself."""
        return scores

    def _group_scores(self, grouped: Tensor) -> Tensor:
        """[num_tokens, n_group, experts of a group] -> [num_tokens, n_group]."""
        raise NotImplementedError

    def _limit_groups(self, choice: Tensor) -> Tensor:
        """`choice` [num_tokens, n_routed_experts] with minus infinity outside the best topk_group groups."""
        config = self.config
        if config.topk_group == config.n_group:
            return choice
        grouped = choice.view(choice.shape[0], config.n_group, -1)
        group_scores = self._group_scores(grouped)
        best = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
        is_left_out = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(is_left_out.unsqueeze(-1), -torch.inf).view_as(choice)


class SigmoidGroupRouter(Router):
    """DeepSeek-V3's router (arXiv 2412.19437, 2.1.2; config kind "sigmoid_bias_groups").

    A group's score is the sum of its two best biased scores. The bias chooses; the weights are the unbiased
    sigmoid scores of the chosen.
    """

    __slots__ = ()

    def __init__(
        self, config: ModelConfig, weight: Tensor, bias: Tensor, num_experts: int | None = None
    ) -> None:
        super().__init__(config, weight, bias, num_experts)
        self.bias: Tensor

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid_()

    def _choice(self, scores: Tensor) -> Tensor:
        return scores + self.bias

    def _group_scores(self, grouped: Tensor) -> Tensor:
        return grouped.topk(2, dim=-1).values.sum(dim=-1)


class SoftmaxGroupRouter(Router):
    """Softmax over all experts, then the best (config kind "softmax_groups"; DeepSeek-V2, arXiv 2405.04434,
    2.2.1, Qwen, Mixtral).

    A group's score is its best expert's. With norm_topk_prob the weights are the softmax over the chosen
    logits alone: a router that takes the best logits first and their softmax after is this kind too.
    """

    __slots__ = ()

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)

    def _group_scores(self, grouped: Tensor) -> Tensor:
        return grouped.amax(dim=-1)


def make_router(
    config: ModelConfig,
    weight: Tensor,
    bias: Tensor | None,
    num_experts: int | None = None,
    logit_bias: Tensor | None = None,
) -> Router:
    """The router of the config's kind; bias: [n_routed_experts] for "sigmoid_bias_groups", else None.

    logit_bias: [n_routed_experts], added to the logits, where the config has router_bias.
    """
    router: Router
    if bias is not None:
        router = SigmoidGroupRouter(config, weight, bias, num_experts)
    else:
        router = SoftmaxGroupRouter(config, weight, None, num_experts)
    router.logit_bias = logit_bias
    return router
