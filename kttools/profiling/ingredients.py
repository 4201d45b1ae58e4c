"""Which ingredients a table has: each is tried on the probe documents and kept only where it pays there.

The simpler option is the one to beat: renormalising before alpha, the router's order before others, the same
k everywhere before k by layer, no protection before some.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kttools_runtime.expert_policy import LayerPolicy

from .allocate import Allocator, Recipe
from .candidates import Allocation, Candidate, Trials
from .layerwise import Policies
from .refine import refine_adaptive, refine_static

# An expert is protected when its largest output norm is this many times the layer's median of those.
SUPER_EXPERT = 4.0
PREFIX_TOKENS = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefixNative(LayerPolicy):
    """A rule that leaves the first tokens of a window to the native router; measured, not served."""

    prefix_tokens: int = PREFIX_TOKENS

    def select(self, expert_ids: Tensor, expert_weights: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """See LayerPolicy.select; always [T, K]."""
        ids, weights = LayerPolicy.select(self, expert_ids, expert_weights, scores)
        missing = expert_ids.shape[1] - ids.shape[1]
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        weights = torch.nn.functional.pad(weights, (0, missing))
        ids[: self.prefix_tokens] = expert_ids[: self.prefix_tokens]
        weights[: self.prefix_tokens] = expert_weights[: self.prefix_tokens]
        return ids, weights


def make_tables(allocator: Allocator, mean: float) -> Allocation:
    """Static and adaptive policies of the mean: ingredients chosen, then refined, all on the probes' KL."""
    trials = Trials(allocator.say)
    recipe, chosen = _choose_flat(allocator, trials, mean)
    static = _static(allocator, trials, mean, recipe, chosen)
    adaptive = _adaptive(allocator, trials, mean, recipe, static, chosen)
    return Allocation(static, adaptive, trials, allocator.sensitivity, allocator.k0, chosen)


def super_experts(allocator: Allocator) -> dict[int, Tensor]:
    """By MoE layer, bool [n_routed_experts]; only layers that have some."""
    found = {}
    for row, index in enumerate(allocator.layers):
        largest = allocator.profile.pooled()["max_norm"][row]
        is_super = largest > SUPER_EXPERT * np.median(largest)
        if is_super.any():
            found[index] = torch.from_numpy(is_super)
    return found


def _choose_flat(allocator: Allocator, trials: Trials, mean: float) -> tuple[Recipe, dict[str, str]]:
    """Scaling, order and protection, each tried with the same k in every layer."""

    def candidate(name: str, recipe: Recipe) -> Candidate:
        policies = allocator.flat(mean, recipe)
        return Candidate(name, policies, allocator.judge.measure(policies))

    recipe = Recipe(order="choice", scaled=False)
    best = trials.enter(candidate("flat, renormalised", recipe))
    options: list[tuple[str, str, dict[str, Any]]] = [
        ("scaling", "flat + alpha", {"scaled": True}),
        ("order", "flat by weight", {"order": "weight"}),
        ("order", "flat by contribution", {"order": "contribution"}),
    ]
    protected = super_experts(allocator)
    if protected:
        options.append(("super experts", "flat, super experts protected", {"protect": protected}))
    for ingredient, name, change in options:
        changed = dataclasses.replace(recipe, **change)
        kept = trials.better(ingredient, best, candidate(name, changed))
        recipe, best = (changed, kept) if kept is not best else (recipe, best)
    chosen = {
        "scaling": "alpha" if recipe.scaled else "renormalised",
        "static order": recipe.order,
        "super experts": _protection(recipe, protected),
    }
    return recipe, chosen


def _protection(recipe: Recipe, protected: dict[int, Tensor]) -> str:
    if not protected:
        return f"none found (an output norm above {SUPER_EXPERT:g} times the layer's median)"
    count = sum(int(rows.sum()) for rows in protected.values())
    return f"{count} found, {'not ' if recipe.protect is None else ''}protected"


def _static(
    allocator: Allocator, trials: Trials, mean: float, recipe: Recipe, chosen: dict[str, str]
) -> Candidate:
    judge = allocator.judge
    flat = allocator.flat(mean, recipe)
    best = trials.enter(Candidate("the same k everywhere", flat, judge.measure(flat)))
    policies = allocator.static(mean, recipe)
    ks = [p.k for p in policies.values()]
    shared = Candidate("k by dynamic programming", policies, judge.measure(policies), allocator.predicted(ks))
    best = trials.better("k by layer", best, shared)
    chosen["k by layer"] = best.name
    best, moves = refine_static(allocator, trials, best, recipe)
    chosen["static refinement"] = f"{moves} moves kept"
    prefix = _with_prefix(best.policies)
    native = Candidate(prefix_name(), prefix, judge.measure(prefix))
    trials.better("first tokens (not served)", best, native, is_served=False)
    chosen["first tokens"] = "measured, not served: a static table could not keep its mean"
    return dataclasses.replace(best, name="static")


def _adaptive(
    allocator: Allocator,
    trials: Trials,
    mean: float,
    recipe: Recipe,
    static: Candidate,
    chosen: dict[str, str],
) -> Candidate:
    # The router's order sorts by biased score; the rule below cuts by weight, so it starts from that order.
    recipe = dataclasses.replace(recipe, order="weight")
    best = trials.enter(_calibrated(allocator, mean, "adaptive by weight", recipe))
    other = dataclasses.replace(recipe, order="contribution")
    kept = trials.better("order", best, _calibrated(allocator, mean, "adaptive by contribution", other))
    recipe, best = (other, kept) if kept is not best else (recipe, best)
    chosen["adaptive order"] = recipe.order
    best, moves = refine_adaptive(allocator, trials, best, static, recipe, mean)
    chosen["adaptive refinement"] = f"{moves} changes of sigma kept"
    return dataclasses.replace(best, name="adaptive")


def _calibrated(allocator: Allocator, mean: float, name: str, recipe: Recipe) -> Candidate:
    found = allocator.calibrated(mean, allocator.judge, recipe, allocator.sigma(recipe))
    return Candidate(name, *found)


def prefix_name() -> str:
    return f"first {PREFIX_TOKENS} tokens native"


def _with_prefix(policies: Policies) -> Policies:
    names = LayerPolicy.__dataclass_fields__
    return {i: PrefixNative(**{n: getattr(p, n) for n in names}) for i, p in policies.items()}
