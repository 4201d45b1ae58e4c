"""How many of a token's native choices one layer computes: the rules behind expert tables, in torch ops.

A rule ranks the native choices, keeps the first n of a token (n fixed or per token), and multiplies their
weights by alpha[n]. Nothing waits for a number on the host, so that a rule runs on the router's device.
The kernels' own form (csrc/expert_rule.h) gives the same bits; sums are float64, so that their order cannot
decide.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidInputError
from .routing import NORM_EPS

# choice: the router's own order (biased scores); weight: by gate weight; contribution: by weight times the
# expert's typical output norm.
ORDERS = ("choice", "weight", "contribution")
KINDS = ("uniform", "static", "adaptive", "ser", "top_p", "naee")
FIXED_KINDS = ("uniform", "static")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPolicy:
    """The rule of one layer. K: the native number of experts.

    k: experts of every token (uniform, static). threshold: lambda of adaptive (keep rank r if
    sigma c_r^2 >= lambda, c the weight or the contribution), t of ser (biased score at least t times the
    best), p of top_p (smallest set with that share of the weight). ratios [K] of naee (stop at the first
    rank whose weight is below ratios[r] times the largest). k_min, k_max: bounds of the rules that count.
    alpha [K]: scale of the kept weights, index n - 1. norms [n_routed_experts]: typical output norms.
    protect [n_routed_experts] bool: experts that are ranked first.
    """

    kind: str
    order: str = "weight"
    k: int = 0
    k_min: int = 1
    k_max: int = 0
    threshold: float = 0.0
    sigma: float = 1.0
    alpha: Tensor | None = None
    ratios: Tensor | None = None
    norms: Tensor | None = None
    protect: Tensor | None = None
    renormalize: bool = False

    def to(self, device: torch.device) -> "LayerPolicy":
        """The same rule with its tensors on `device`."""
        tensors = {name: getattr(self, name) for name in ("alpha", "ratios", "norms", "protect")}
        return replace(self, **{name: t.to(device) for name, t in tensors.items() if t is not None})

    def native(self, num_experts: int, choices: int) -> Any:
        """The same rule in C++, for a router of num_experts that chooses `choices` of them.

        Raises InvalidInputError for counts or lists that do not fit the router.
        """
        from . import _kernels

        lists = {name: getattr(self, name) for name in ("alpha", "ratios", "norms", "protect")}
        try:
            return _kernels.ExpertRule(
                kind=self.kind,
                order=self.order,
                num_experts=num_experts,
                choices=choices,
                k=self.k,
                k_min=self.k_min,
                k_max=self.k_max,
                threshold=self.threshold,
                sigma=self.sigma,
                renormalise=self.renormalize,
                **{name: t.contiguous().numpy() for name, t in lists.items() if t is not None},
            )
        except ValueError as error:
            raise InvalidInputError(str(error)) from None

    def select(self, expert_ids: Tensor, expert_weights: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64, weights float32 and biased scores float32, all [T, K] in the router's order.

        Returns ids and weights, [T, k] for a fixed k, else [T, K] with -1 and 0 for what is dropped.
        """
        strength = self.strength(expert_ids, expert_weights)
        if self.order != "choice" or self.protect is not None:
            ranks = self.ranks(expert_ids, expert_weights, scores)
            expert_ids, expert_weights = expert_ids.gather(1, ranks), expert_weights.gather(1, ranks)
            strength, scores = strength.gather(1, ranks), scores.gather(1, ranks)
        if self.kind in FIXED_KINDS:
            return self._first(expert_ids, expert_weights, self.k)
        count = self.count(expert_weights, strength, scores)
        return self._counted(expert_ids, expert_weights, count)

    def ranks(self, expert_ids: Tensor, expert_weights: Tensor, scores: Tensor) -> Tensor:
        """int64 [T, K]: the positions of the choices, the one to keep longest first."""
        key = scores if self.order == "choice" else self.strength(expert_ids, expert_weights)
        if self.protect is not None:
            key = key.masked_fill(self.protect[expert_ids], torch.inf)
        return key.argsort(dim=1, descending=True, stable=True)

    def strength(self, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """c of each choice: its weight, times its typical norm when ordering by contribution."""
        if self.order != "contribution" or self.norms is None:
            return expert_weights
        return expert_weights * self.norms[expert_ids]

    def count(self, weights: Tensor, strength: Tensor, scores: Tensor) -> Tensor:
        """int64 [T]: how many of the ranked choices each token keeps."""
        if self.kind == "adaptive":
            kept = (strength.square() * self.sigma >= self.threshold).sum(dim=1)
        elif self.kind == "ser":
            kept = (scores >= self.threshold * scores.amax(dim=1, keepdim=True)).sum(dim=1)
        elif self.kind == "top_p":
            exact = weights.double()
            before = exact.cumsum(dim=1) - exact
            kept = (before < self.threshold * exact.sum(dim=1, keepdim=True)).sum(dim=1)
        elif self.kind == "naee" and self.ratios is not None:
            largest = weights.amax(dim=1, keepdim=True)
            kept = (weights >= self.ratios * largest).to(torch.int64).cumprod(dim=1).sum(dim=1)
        else:
            raise AssertionError(f"kind {self.kind} counts nothing")
        return kept.clamp(self.k_min, self.k_max)

    def _first(self, expert_ids: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
        kept = weights[:, :k]
        if self.renormalize:
            kept = kept * weight_scale(weights, kept)
        if self.alpha is not None:
            kept = kept * self.alpha[k - 1]
        return expert_ids[:, :k].contiguous(), kept.contiguous()

    def _counted(self, expert_ids: Tensor, weights: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        is_dropped = torch.arange(weights.shape[1], device=weights.device) >= count[:, None]
        kept = weights.masked_fill(is_dropped, 0.0)
        if self.renormalize:
            kept = kept * weight_scale(weights, kept)
        if self.alpha is not None:
            kept = kept * self.alpha[count - 1][:, None]
        return expert_ids.masked_fill(is_dropped, -1), kept


def weight_scale(weights: Tensor, kept: Tensor) -> Tensor:
    """float32 [T, 1]: what gives `kept` [T, n] the sum of `weights` [T, K]."""
    whole, part = (each.double().sum(dim=1, keepdim=True) for each in (weights, kept))
    return (whole / (part + NORM_EPS)).float()
