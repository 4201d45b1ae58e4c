"""Intervals by resampling documents: paired, stratified by domain, the same draws for every policy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REPLICATES, CONFIDENCE, SEED = 10_000, 0.95, 0


@dataclass(frozen=True, slots=True)
class Interval:
    value: float
    low: float
    high: float


class Bootstrap:
    """Draws of documents. domains: of each document, in the order of every array given later."""

    def __init__(self, domains: Sequence[str], replicates: int = REPLICATES, seed: int = SEED) -> None:
        self.domains = np.array(domains)
        generator = np.random.default_rng(seed)
        self.draws = np.zeros((replicates, len(domains)), dtype=np.float64)
        for domain in sorted(set(domains)):
            rows = np.flatnonzero(self.domains == domain)
            share = np.full(len(rows), 1 / len(rows))
            self.draws[:, rows] = generator.multinomial(len(rows), share, size=replicates)

    def ratio(
        self, above: np.ndarray, below: np.ndarray, domain: str | None = None
    ) -> tuple[float, np.ndarray]:
        """sum(above) / sum(below) and its replicates; of one domain when given."""
        chosen = np.ones(len(self.domains), bool) if domain is None else self.domains == domain
        draws = self.draws[:, chosen]
        value = above[chosen].sum() / below[chosen].sum()
        return float(value), (draws @ above[chosen]) / (draws @ below[chosen])


def interval(value: float, replicates: np.ndarray) -> Interval:
    """The percentile interval."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def two_sided_p(replicates: np.ndarray) -> float:
    """How often a difference crosses zero, doubled; at least 1 / replicates."""
    crossing = min((replicates <= 0).mean(), (replicates >= 0).mean())
    return float(min(1.0, max(2 * crossing, 1 / len(replicates))))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Adjusted p-values of a family of tests (Holm 1979)."""
    adjusted: dict[str, float] = {}
    running = 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        running = max(running, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = running
    return adjusted
