"""From a profile to tables: sensitivities on the probe documents, then experts where they count most."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kttools_runtime.errors import InvalidInputError, UsageError
from kttools_runtime.expert_policy import LayerPolicy

from .knapsack import allocate_exact
from .layerwise import LayerRunner, Policies, Window
from .measure import Judge, Measured
from .pricing import counted_scales, prefix_errors, prefix_scales
from .probes import probe_windows
from .profile_file import Profile
from .recorder import Observation, recording
from .sensitivity import Sensitivity, sensitivities

# A change is kept when its paired gain on the probe documents is this many standard errors from nothing.
SIGNIFICANT = 2.0
REFINEMENTS = 6
CALIBRATION_TOLERANCE = 0.01
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A table in the making, and what it measured on the probe documents."""

    name: str
    policies: Policies
    measured: Measured


@dataclass(frozen=True, slots=True)
class Allocation:
    """Everything the table's provenance tells."""

    static: Candidate
    adaptive: Candidate
    candidates: list[Candidate]
    sensitivity: dict[int, Sensitivity]
    steps: list[str]

    @property
    def best(self) -> Candidate:
        return min((self.static, self.adaptive), key=lambda c: c.measured.kl_mean)


class Allocator:
    """Makes tables of one mean; the expensive parts (forks, observations) are made once."""

    def __init__(self, runner: LayerRunner, profile: Profile, say: Say = lambda line: None) -> None:
        if profile.header["fingerprint"] != runner.fingerprint:
            raise InvalidInputError("the profile was made of another model: its fingerprint differs")
        self.runner, self.say = runner, say
        self.layers = list(runner.config.moe_layers)
        self.native = runner.config.num_experts_per_tok
        self.windows = probe_windows(profile.trace)
        self.judge = Judge(runner, self.windows)
        self.gram = {name: _balanced(profile, f"gram_{name}") for name in ("choice", "weight")}
        self.mean_norm2 = _balanced_ratio(profile, "sum_norm2", "count")
        self.observed = observe(runner, self.windows)
        self.steps: list[str] = []
        self.sensitivity = self._sensitivities()

    def uniform(self, k: int, order: str, scaled: bool) -> Policies:
        """Flat k: renormalised, or scaled by alpha."""
        plain = {
            i: LayerPolicy(kind="uniform", k=k, order=order, renormalize=not scaled) for i in self.layers
        }
        return self._scaled(plain) if scaled else plain

    def static(self, mean: float) -> Policies:
        """k per layer by dynamic programming on s_l eps_l(k)."""
        total = round(mean * len(self.layers))
        costs = [
            [self.sensitivity[i].s * float(e) for e in prefix_errors(self.gram["weight"][row])]
            for row, i in enumerate(self.layers)
        ]
        try:
            return self.fixed(allocate_exact(costs, total))
        except ValueError as error:
            raise UsageError(f"--mean-experts {mean}: {error}") from None

    def fixed(self, ks: list[int]) -> Policies:
        """The static policy of given k by layer."""
        return self._scaled(
            {i: LayerPolicy(kind="static", k=k, order="weight") for i, k in zip(self.layers, ks, strict=True)}
        )

    def adaptive(self, mean: float, sigma: dict[int, float] | None = None) -> Policies:
        """Keep rank r if sigma_l w_r^2 >= lambda; lambda by bisection on the probes' native choices."""
        sigma = self.sigma() if sigma is None else sigma
        low, high = 1e-20, 1e10
        for _ in range(70):
            middle = (low * high) ** 0.5
            if self._mean_count(sigma, middle) > mean:
                low = middle
            else:
                high = middle
        return self.thresholded(sigma, low)

    def thresholded(self, sigma: dict[int, float], threshold: float) -> Policies:
        """The adaptive policy of given sigma and lambda, with its scales."""
        policies = {}
        for row, index in enumerate(self.layers):
            plain = LayerPolicy(
                kind="adaptive", order="weight", sigma=sigma[index], threshold=threshold, k_max=self.native
            )
            seen = self.observed[index]
            ranks = plain.ranks(seen.expert_ids, seen.weights, seen.weights)
            weights = seen.weights.gather(1, ranks)
            count = plain.count(weights, weights, weights)
            scales = counted_scales(seen, ranks, count, prefix_scales(self.gram["weight"][row]))
            policies[index] = dataclasses.replace(plain, alpha=scales.float())
        return policies

    def calibrated(
        self, mean: float, judge: Judge, sigma: dict[int, float] | None = None
    ) -> tuple[Policies, Measured]:
        """The adaptive policy whose realised mean on the judge's windows is `mean`; no KL is looked at."""
        asked = mean
        policies = self.adaptive(asked, sigma)
        measured = judge.measure(policies)
        for _ in range(4):
            off = measured.k_mean() - mean
            if abs(off) <= CALIBRATION_TOLERANCE:
                break
            asked -= off
            policies = self.adaptive(asked, sigma)
            measured = judge.measure(policies)
        return policies, measured

    def sigma(self) -> dict[int, float]:
        """s_l times the layer's mean squared output norm, so that sigma w^2 is in units of KL."""
        return {i: self.sensitivity[i].s * float(self.mean_norm2[r]) for r, i in enumerate(self.layers)}

    def run(self, mean: float) -> Allocation:
        """Both kinds, refined on the probe documents' KL."""
        flat = self._candidate("flat-alpha", self.uniform(round(mean), "weight", scaled=True))
        static = self._candidate("static", self.static(mean))
        static, tried = self._refine_static(static)
        policies, measured = self.calibrated(mean, self.judge)
        adaptive = self._refine_adaptive(Candidate("adaptive", policies, measured), mean)
        return Allocation(
            static, adaptive, [flat, *tried, static, adaptive], self.sensitivity, list(self.steps)
        )

    def _refine_static(self, best: Candidate) -> tuple[Candidate, list[Candidate]]:
        """Moves one expert between two layers while the paired gain is significant."""
        tried: list[Candidate] = []
        for give, take in self._moves(best)[:REFINEMENTS]:
            ks = [best.policies[i].k for i in self.layers]
            ks[give], ks[take] = ks[give] - 1, ks[take] + 1
            if min(ks) < 1 or max(ks) > self.native:
                continue
            candidate = self._candidate(f"static {ks}", self.fixed(ks))
            tried.append(candidate)
            best = self._better(best, candidate)
        return Candidate("static", best.policies, best.measured), tried

    def _moves(self, best: Candidate) -> list[tuple[int, int]]:
        """(layer that gives, layer that takes), the least predicted loss first."""
        price = {
            r: self.sensitivity[i].s * prefix_errors(self.gram["weight"][r])
            for r, i in enumerate(self.layers)
        }
        ks = [best.policies[i].k for i in self.layers]
        moves = []
        for give, k in enumerate(ks):
            for take, other in enumerate(ks):
                if give != take and k > 1 and other < self.native:
                    loss = price[give][k - 2] - price[give][k - 1]
                    gain = price[take][other - 1] - price[take][other]
                    moves.append((float(loss - gain), give, take))
        return [(give, take) for _, give, take in sorted(moves)]

    def _refine_adaptive(self, best: Candidate, mean: float) -> Candidate:
        """Scales one layer's sigma up or down while the paired gain is significant."""
        for index in self.layers:
            for factor in (1.5, 1 / 1.5):
                sigma = {i: p.sigma for i, p in best.policies.items()}
                sigma[index] *= factor
                policies, measured = self.calibrated(mean, self.judge, sigma)
                named = Candidate(f"adaptive, sigma of layer {index} x {factor:.2f}", policies, measured)
                kept = self._better(best, named)
                if kept is not best:
                    best = Candidate("adaptive", kept.policies, kept.measured)
                    break
        return best

    def _better(self, best: Candidate, other: Candidate) -> Candidate:
        gain, error = paired_gain(best.measured, other.measured)
        is_better = gain > SIGNIFICANT * error
        self.steps.append(
            f"{other.name}: KL {other.measured.kl_mean:.6f} against {best.measured.kl_mean:.6f}, "
            f"gain {gain:.6f} +- {error:.6f}: {'kept' if is_better else 'not kept'}"
        )
        self.say(self.steps[-1])
        return other if is_better else best

    def _candidate(self, name: str, policies: Policies) -> Candidate:
        candidate = Candidate(name, policies, self.judge.measure(policies))
        self.say(f"{name}: KL {candidate.measured.kl_mean:.6f} at {candidate.measured.k_mean():.3f} experts")
        return candidate

    def _scaled(self, policies: Policies) -> Policies:
        scaled = {}
        for row, index in enumerate(self.layers):
            gram = self.gram["choice" if policies[index].order == "choice" else "weight"][row]
            scaled[index] = dataclasses.replace(policies[index], alpha=prefix_scales(gram).float())
        return scaled

    def _mean_count(self, sigma: dict[int, float], threshold: float) -> float:
        total = 0.0
        for index in self.layers:
            kept = (self.observed[index].weights.square() * sigma[index] >= threshold).sum(dim=1)
            total += float(kept.clamp(1, self.native).double().mean())
        return total / len(self.layers)

    def _sensitivities(self) -> dict[int, Sensitivity]:
        k0 = max(1, self.native // 2)
        reduced = self._scaled({i: LayerPolicy(kind="static", k=k0, order="weight") for i in self.layers})
        epsilon = {i: float(prefix_errors(self.gram["weight"][r])[k0 - 1]) for r, i in enumerate(self.layers)}
        return sensitivities(self.runner, self.windows, reduced, epsilon)


def paired_gain(old: Measured, new: Measured) -> tuple[float, float]:
    """Mean KL of old minus new per token, and its standard error over documents."""
    before, tokens = old.kl_vector()
    after, _ = new.kl_vector()
    difference = before - after
    mean = difference.sum() / tokens.sum()
    spread = (difference - mean * tokens).square().sum().sqrt() / tokens.sum()
    return float(mean), float(spread)


@torch.inference_mode()
def observe(runner: LayerRunner, chosen: list[Window]) -> dict[int, Observation]:
    """All observations of some windows, by MoE layer."""
    seen: dict[int, list[Observation]] = {i: [] for i in runner.config.moe_layers}
    for window in chosen:
        hidden = runner.embed(window.token_ids)
        for index in range(runner.num_layers):
            moe = runner.moe(index)
            if moe is None:
                runner.run(index, hidden)
                continue
            with recording(moe) as recorder:
                runner.run(index, hidden)
            seen[index].append(recorder.take())
    fields = Observation.__dataclass_fields__
    return {
        i: Observation(**{name: torch.cat([getattr(o, name) for o in rows]) for name in fields})
        for i, rows in seen.items()
    }


def provenance(allocation: Allocation, profile: Profile, probes: list[Window]) -> dict[str, Any]:
    """What the table says about how it was made."""
    sensitivity = {
        str(i): {
            "d": s.d,
            "standard_error": s.standard_error,
            "noise": s.noise,
            "epsilon": s.epsilon,
            "s": s.s,
        }
        for i, s in allocation.sensitivity.items()
    }
    chosen = {allocation.static.name, allocation.adaptive.name}
    candidates = [
        {
            "name": c.name,
            "kind": next(iter(c.policies.values())).kind,
            "order": next(iter(c.policies.values())).order,
            "k_mean": c.measured.k_mean(),
            "kl": c.measured.kl_mean,
            "chosen": c.name in chosen,
        }
        for c in allocation.candidates
    ]
    return {
        "profile_sha256": profile.header["sidecar"]["sha256"],
        "domains": sorted(profile.stats),
        "sensitivity": {
            "layers": sensitivity,
            "documents": len({(w.domain, w.document) for w in probes}),
            "tokens": sum(len(w.token_ids) for w in probes),
        },
        "candidates": candidates,
        "steps": allocation.steps,
    }


def _balanced(profile: Profile, name: str) -> Tensor:
    """Mean over domains of the statistic per token, so that a large domain does not decide alone."""
    rows = [
        torch.from_numpy(stats[name] / stats["tokens"][:, None, None])
        for _, stats in sorted(profile.stats.items())
    ]
    return torch.stack(rows).mean(dim=0)


def _balanced_ratio(profile: Profile, above: str, below: str) -> Tensor:
    rows = [
        torch.from_numpy(stats[above].sum(axis=1) / stats[below].sum(axis=1))
        for _, stats in sorted(profile.stats.items())
    ]
    return torch.stack(rows).mean(dim=0)
