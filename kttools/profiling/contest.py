"""Who is judged: both kinds of table, and what others do, all at the same realised mean."""

import dataclasses
from typing import Any

from .allocate import Allocator, Recipe
from .candidates import Allocation, Say
from .evaluate import Contender, Evaluation, pareto_point
from .layerwise import Policies
from .measure import Judge, Measured
from .plain_policies import flat_rule
from .policies import Baselines

# The baselines that the verdict is about, the first of them the flat one.
COMPARED = ["flat", "flat-alpha", "ser"]


@dataclasses.dataclass(frozen=True, slots=True)
class Contest:
    """contenders: all of them. calibration: how the adaptive table's lambda was set, by kind."""

    contenders: list[Contender]
    calibration: dict[str, dict[str, Any]]


def contest(judge: Judge, mean: float, allocator: Allocator, allocation: Allocation, say: Say) -> Contest:
    """Measures everyone. The adaptive table's lambda is set so that its mean on these windows is `mean`:
    that looks at how many experts its rule keeps here, never at KL."""
    found: list[Contender] = []

    def add(name: str, label: str, policies: Policies, measured: Measured, is_baseline: bool) -> None:
        found.append(Contender(name, label, policies, measured, is_baseline))
        say(f"{label}: {measured.k_mean():.3f} experts, KL {measured.kl_mean:.5f}")

    baselines = Baselines(judge)
    flat = baselines.flat(mean)
    add("flat", f"flat top-{mean:g}, renormalised", flat, judge.measure(flat), True)
    alpha = allocator.flat(mean, Recipe(order="choice"))
    add("flat-alpha", f"flat top-{mean:g} + alpha", alpha, judge.measure(alpha), True)
    static = allocation.static.policies
    add("static", "static table", static, judge.measure(static), False)
    made = allocation.adaptive.policies
    before = judge.measure(made)
    policies, measured = allocator.calibrated(mean, judge, recipe_of(made), sigma_of(made))
    add("adaptive", "adaptive table", policies, measured, False)
    label, policies, measured = baselines.ser(mean)
    add("ser", label, policies, measured, True)
    add("top-p", "top-p, renormalised", *baselines.top_p(mean), True)
    add("naee", *baselines.naee(mean), True)
    return Contest(found, {"adaptive": _calibration(made, before, found[3])})


def pareto(
    evaluation: Evaluation,
    allocator: Allocator,
    allocation: Allocation,
    mean: float,
    say: Say,
) -> list[dict[str, Any]]:
    """Points of one more mean; tables of it are made without refinement, with the ingredients chosen."""
    recipe, made = recipe_of(allocation.static.policies), allocation.adaptive.policies
    judge = evaluation.judge
    rows = {
        "flat": flat_rule(allocator.layers, mean),
        "flat-alpha": allocator.flat(mean, Recipe(order="choice")),
        "static": allocator.static(mean, recipe),
        "adaptive": allocator.adaptive(mean, recipe_of(made), sigma_of(made)),
    }
    points = []
    for name, policies in rows.items():
        contender = Contender(name, name, policies, judge.measure(policies), name.startswith("flat"))
        points.append(pareto_point(evaluation.policy_document(contender)))
        say(f"pareto {name}: {points[-1]['k_mean']:.3f} experts, KL {points[-1]['kl_mean']:.5f}")
    return points


def recipe_of(policies: Policies) -> Recipe:
    """The ingredients that a table was made with."""
    first = next(iter(policies.values()))
    protect = {i: p.protect for i, p in policies.items() if p.protect is not None}
    return Recipe(first.order, not first.renormalize, protect or None)


def sigma_of(policies: Policies) -> dict[int, float]:
    return {index: policy.sigma for index, policy in policies.items()}


def _calibration(made: Policies, before: Measured, after: Contender) -> dict[str, Any]:
    return {
        "on": "the routing of the evaluation data; KL is not looked at",
        "threshold_from_probes": next(iter(made.values())).threshold,
        "k_mean_from_probes": before.k_mean(),
        "kl_from_probes": before.kl_mean,
        "threshold": next(iter(after.policies.values())).threshold,
        "k_mean": after.measured.k_mean(),
    }
