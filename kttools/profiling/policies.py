"""What others do, exactly enough to be compared with: flat k, -ser, top-p and NAEE at a given mean."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kttools_runtime.expert_policy import LayerPolicy

from .layerwise import LayerRunner, Policies, Window
from .measure import Judge, Measured
from .plain_policies import counted_rule, flat_rule

MEAN_TOLERANCE = 0.01
SER_MINIMA = (1, 3, 5)
# One window of this many chooses among those that come this near to the mean.
SER_SAMPLE = 4
SER_NEAR = 0.05


@dataclass(frozen=True, slots=True)
class NativeChoices:
    """The router's own choices in one layer over some windows, each [T, K] in its order."""

    expert_ids: Tensor
    weights: Tensor
    scores: Tensor


class _Collector:
    """A layer table that changes nothing and remembers what passes."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def select(self, ids: Tensor, weights: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append((ids, weights.clone(), scores.clone()))
        return ids, weights


def native_choices(runner: LayerRunner, chosen: list[Window]) -> dict[int, NativeChoices]:
    """By MoE layer."""
    collectors = {i: _Collector() for i in runner.config.moe_layers}
    for window in chosen:
        hidden = runner.embed(window.token_ids)
        for index in range(runner.num_layers):
            runner.run(index, hidden, collectors.get(index))
    return {
        i: NativeChoices(*[torch.cat(column) for column in zip(*c.seen, strict=True)])
        for i, c in collectors.items()
    }


class Baselines:
    """The rules of others, their thresholds set on the windows they are judged on (in their favour)."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.choices = native_choices(judge.runner, judge.windows)
        self.native = judge.runner.config.num_experts_per_tok
        # How far a rule's realised mean was from what the native choices promised, the last time.
        self._offset = 0.0

    def flat(self, mean: float) -> Policies:
        """See plain_policies.flat_rule."""
        return flat_rule(list(self.choices), mean)

    def ser(self, mean: float) -> tuple[str, Policies, Measured]:
        """-ser Kmin,t: ranks from Kmin on need t times the best biased score.

        Several Kmin, with and without renormalising, are compared on a part of the windows; the best of them
        is then set on all.
        """
        tried = []
        sample = self.judge.part(SER_SAMPLE)
        for k_min in SER_MINIMA:
            for renormalize in (True, False):

                def build(t: float, k_min: int = k_min, renormalize: bool = renormalize) -> Policies:
                    return self._rule("ser", "choice", t, k_min, renormalize)

                measured = self.matched(build, mean, sample)[1]
                off = max(0.0, abs(measured.k_mean() - mean) - SER_NEAR)
                tried.append((off, measured.kl_mean, k_min, renormalize, build))
        *_, k_min, renormalize, build = min(tried, key=lambda row: row[:2])
        policies, measured = self.matched(build, mean)
        t = next(iter(policies.values())).threshold
        return f"-ser {k_min},{t:.3f}{' renormalised' if renormalize else ''}", policies, measured

    def top_p(self, mean: float) -> tuple[Policies, Measured]:
        """The fewest experts with a share p of the weight, renormalised."""
        return self.matched(lambda t: self._rule("top_p", "weight", 1.0 - t, 1, True), mean)

    def naee(self, mean: float) -> tuple[str, Policies, Measured]:
        """NAEE (arXiv 2402.14800), its rule for the second expert applied at every rank: stop where w_r falls
        below beta_r w_1. beta_r is a quantile of that ratio, as in the paper, or the same at every rank; the
        mean sets it, and the better of the two stands here."""
        ratios = {}
        for index, seen in self.choices.items():
            weights = seen.weights.sort(dim=1, descending=True).values
            ratios[index] = (weights / weights[:, :1])[:: max(1, len(weights) // 100_000)]

        def quantiles(q: float) -> Policies:
            return self._naee({i: torch.quantile(r, q, dim=0) for i, r in ratios.items()})

        def constant(beta: float) -> Policies:
            return self._naee({i: torch.full((self.native,), beta) for i in ratios})

        rules = {"a beta per rank": quantiles, "one beta": constant}
        tried = [(f"NAEE, {name}", *self.matched(rule, mean)) for name, rule in rules.items()]
        return min(tried, key=lambda row: row[2].kl_mean)

    def _naee(self, ratios: dict[int, Tensor]) -> Policies:
        return {
            i: LayerPolicy(kind="naee", ratios=row, k_max=self.native, renormalize=True)
            for i, row in ratios.items()
        }

    def matched(
        self, build: Callable[[float], Policies], mean: float, judge: Judge | None = None
    ) -> tuple[Policies, Measured]:
        """The rule build(t), t in 0..1 and dropping more as it grows, whose realised mean is `mean`.

        judge: where it is realised; None: on all windows.
        """
        judge = self.judge if judge is None else judge
        asked = mean - self._offset
        for _ in range(4):
            policies = build(self._bisect(build, asked))
            measured = judge.measure(policies)
            self._offset = measured.k_mean() - asked
            if abs(measured.k_mean() - mean) <= MEAN_TOLERANCE:
                break
            asked = mean - self._offset
        return policies, measured

    def _bisect(self, build: Callable[[float], Policies], mean: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            if self._count(build(middle)) > mean:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def _count(self, policies: Policies) -> float:
        kept = 0.0
        for index, seen in self.choices.items():
            policy = policies[index]
            ids = policy.select(seen.expert_ids, seen.weights, seen.scores)[0]
            kept += float((ids >= 0).sum()) / len(ids)
        return kept / len(self.choices)

    def _rule(self, kind: str, order: str, threshold: float, k_min: int, renormalize: bool) -> Policies:
        return counted_rule(list(self.choices), self.native, kind, order, threshold, k_min, renormalize)
