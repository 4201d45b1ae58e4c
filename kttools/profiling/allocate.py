"""From a profile to policies: experts where they count most, at a given mean, with the scales that fit.

Which ingredients a table has is a Recipe; kttools.profiling.ingredients chooses it by measurement.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kttools_runtime.errors import InvalidInputError, UsageError
from kttools_runtime.expert_policy import LayerPolicy

from .candidates import Say
from .knapsack import allocate_exact, share_evenly
from .layerwise import LayerRunner, Policies, Window
from .measure import Judge, Measured
from .measured_file import MeasuredFiles
from .observe import observe
from .pricing import counted_scales, prefix_errors, prefix_scales
from .profile_file import Profile
from .sensitivity import Sensitivity, kept_sensitivities, sensitivities
from .statistics import by_rank

CALIBRATION_TOLERANCE = 0.004
CALIBRATION_STEPS = 6
# An expert's typical norm is the mean of what was seen and this many sights of the layer's mean.
NORM_SHRINKAGE = 32.0


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """What measurement decides. scaled: kept weights are multiplied by alpha instead of renormalised.

    protect: by MoE layer, bool [n_routed_experts], experts that are ranked first; None: none.
    """

    order: str = "weight"
    scaled: bool = True
    protect: dict[int, Tensor] | None = None


class Allocator:
    """Makes policies of any mean; the expensive parts (forks, observations) are made once.

    store: a directory where measurements and forks are kept for a later run, or None.
    """

    def __init__(
        self,
        runner: LayerRunner,
        profile: Profile,
        windows: list[Window],
        store: Path | None = None,
        say: Say = lambda line: None,
    ) -> None:
        if profile.header["fingerprint"] != runner.fingerprint:
            raise InvalidInputError("the profile was made of another model: its fingerprint differs")
        self.runner, self.profile, self.say, self.windows = runner, profile, say, windows
        self.layers = list(runner.config.moe_layers)
        self.native = runner.config.num_experts_per_tok
        files = None if store is None else MeasuredFiles(store, runner.fingerprint, windows)
        self.judge = Judge(runner, windows, files)
        self._gram = {name: _balanced(profile, f"gram_{name}") for name in ("choice", "weight")}
        # How many sights of an expert stand behind its norms: not every token's outputs are looked at.
        self._sights = "observed_count" if "observed_count" in profile.pooled() else "count"
        self._mean_norm2 = _balanced_ratio(profile, "sum_norm2", "count")
        self._pooled = profile.pooled()
        self.observed = observe(runner, windows)
        self._offsets: dict[int, float] = {}
        self.k0 = max(1, self.native // 2)
        self.sensitivity = self._sensitivities(store)

    def flat(self, mean: float, recipe: Recipe) -> Policies:
        """The same k everywhere; a mean that is no whole number is spread evenly over the layers."""
        return self.fixed(share_evenly(mean, len(self.layers)), recipe, kind="uniform")

    def static(self, mean: float, recipe: Recipe) -> Policies:
        """k per layer by dynamic programming on s_l eps_l(k)."""
        costs = [[float(e) for e in row] for row in self.prices()]
        try:
            return self.fixed(allocate_exact(costs, round(mean * len(self.layers))), recipe)
        except ValueError as error:
            raise UsageError(f"--mean-experts {mean}: {error}") from None

    def prices(self) -> list[Tensor]:
        """Predicted KL of each MoE layer alone by k, index k - 1, kept by weight and scaled."""
        return [
            self.sensitivity[i].s * prefix_errors(self._gram["weight"][row])
            for row, i in enumerate(self.layers)
        ]

    def predicted(self, ks: list[int]) -> float:
        """KL of given k by layer if the layers' damages simply added up."""
        return float(sum(price[k - 1] for price, k in zip(self.prices(), ks, strict=True)))

    def fixed(self, ks: list[int], recipe: Recipe, kind: str = "static") -> Policies:
        """The policy of given k by layer."""
        policies = {}
        for index, k in zip(self.layers, ks, strict=True):
            plain = self._plain(index, recipe, kind=kind, k=k)
            if recipe.scaled:
                plain = dataclasses.replace(plain, alpha=prefix_scales(self._ranked(index, plain)).float())
            policies[index] = plain
        return policies

    def adaptive(self, mean: float, recipe: Recipe, sigma: dict[int, float]) -> Policies:
        """Keep rank r if sigma_l c_r^2 >= lambda; lambda by bisection on the probes' native choices."""
        low, high = 1e-20, 1e10
        strengths = {i: self._strength(i, recipe).square() * sigma[i] for i in self.layers}
        for _ in range(70):
            middle = (low * high) ** 0.5
            kept = [(s >= middle).sum(dim=1).clamp_min(1).double().mean() for s in strengths.values()]
            if float(sum(kept)) / len(kept) > mean:
                low = middle
            else:
                high = middle
        return self.thresholded(recipe, sigma, low)

    def thresholded(self, recipe: Recipe, sigma: dict[int, float], threshold: float) -> Policies:
        """The adaptive policy of given sigma and lambda, with its scales by the number kept."""
        policies = {}
        for index in self.layers:
            plain = self._plain(
                index, recipe, kind="adaptive", sigma=sigma[index], threshold=threshold, k_max=self.native
            )
            if recipe.scaled:
                plain = dataclasses.replace(plain, alpha=self._counted(index, plain))
            policies[index] = plain
        return policies

    def calibrated(
        self, mean: float, judge: Judge, recipe: Recipe, sigma: dict[int, float]
    ) -> tuple[Policies, Measured]:
        """The adaptive policy whose realised mean on the judge's windows is `mean`; no KL is looked at."""
        asked = mean - self._offsets.get(id(judge), 0.0)
        for _ in range(CALIBRATION_STEPS):
            policies = self.adaptive(asked, recipe, sigma)
            measured = judge.measure(policies)
            self._offsets[id(judge)] = measured.k_mean() - asked
            if abs(measured.k_mean() - mean) <= CALIBRATION_TOLERANCE:
                break
            asked += mean - measured.k_mean()
        return policies, measured

    def sigma(self, recipe: Recipe) -> dict[int, float]:
        """s_l, times the layer's mean squared output norm unless c has it: sigma c^2 is in units of KL."""
        if recipe.order == "contribution":
            return {i: self.sensitivity[i].s for i in self.layers}
        return {i: self.sensitivity[i].s * float(self._mean_norm2[r]) for r, i in enumerate(self.layers)}

    def norms(self, index: int) -> Tensor:
        """RMS output norm of every expert of a layer, float32 [n_routed_experts], rare ones shrunk."""
        row = self.layers.index(index)
        mean = self._mean_norm2[row]
        seen, count = (torch.from_numpy(self._pooled[name][row]) for name in ("sum_norm2", "count"))
        return ((seen + NORM_SHRINKAGE * mean) / (count + NORM_SHRINKAGE)).sqrt().float()

    def kept_shares(self, policies: Policies) -> np.ndarray:
        """The part of the probes' tokens that keep the choice of each rank, float64 [L, K]."""
        rows = []
        for index, policy in policies.items():
            seen, ranks = self.observed[index], self._ranks(index, policy)
            kept, _ = policy.select(seen.expert_ids, seen.weights, -ranks.argsort(dim=1).float())
            share = (kept >= 0).double().mean(dim=0)
            rows.append(torch.nn.functional.pad(share, (0, self.native - len(share))))
        return torch.stack(rows).numpy()

    def _plain(self, index: int, recipe: Recipe, **rule: Any) -> LayerPolicy:
        return LayerPolicy(
            order=recipe.order,
            renormalize=not recipe.scaled,
            norms=self.norms(index) if recipe.order == "contribution" else None,
            protect=None if recipe.protect is None else recipe.protect.get(index),
            **rule,
        )

    def _ranked(self, index: int, policy: LayerPolicy) -> Tensor:
        """Mean rank Gram [K, K] in the policy's order: the profile's where it has it, else the probes'."""
        if policy.protect is None and policy.order in self._gram:
            return self._gram[policy.order][self.layers.index(index)]
        return by_rank(self.observed[index].gram, self._ranks(index, policy)).double().mean(dim=0)

    def _ranks(self, index: int, policy: LayerPolicy) -> Tensor:
        seen = self.observed[index]
        # The choices come in the router's order: any falling scores stand for its own.
        scores = torch.arange(self.native, 0, -1.0).expand_as(seen.weights)
        return policy.ranks(seen.expert_ids, seen.weights, scores)

    def _strength(self, index: int, recipe: Recipe) -> Tensor:
        seen = self.observed[index]
        return self._plain(index, recipe, kind="adaptive").strength(seen.expert_ids, seen.weights)

    def _counted(self, index: int, policy: LayerPolicy) -> Tensor:
        seen, ranks = self.observed[index], self._ranks(index, policy)
        weights = seen.weights.gather(1, ranks)
        strength = policy.strength(seen.expert_ids, seen.weights).gather(1, ranks)
        count = policy.count(weights, strength, weights)
        return counted_scales(seen, ranks, count, prefix_scales(self._ranked(index, policy))).float()

    def _sensitivities(self, store: Path | None) -> dict[int, Sensitivity]:
        reduced = self.fixed([self.k0] * len(self.layers), Recipe())
        epsilon = {
            i: float(prefix_errors(self._gram["weight"][r])[self.k0 - 1]) for r, i in enumerate(self.layers)
        }
        return kept_sensitivities(
            store,
            self.runner.fingerprint,
            self.windows,
            reduced,
            lambda: sensitivities(self.runner, self.windows, reduced, epsilon),
        )


def _balanced(profile: Profile, name: str) -> Tensor:
    """Mean over domains of the statistic per token, so that a large domain does not decide alone."""
    rows = [stats[name] / stats["tokens"][:, None, None] for _, stats in sorted(profile.stats.items())]
    return torch.from_numpy(np.mean(rows, axis=0))


def _balanced_ratio(profile: Profile, above: str, below: str) -> Tensor:
    rows = [stats[above].sum(axis=1) / stats[below].sum(axis=1) for _, stats in sorted(profile.stats.items())]
    return torch.from_numpy(np.mean(rows, axis=0))
