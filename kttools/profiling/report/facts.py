"""What the report shows, as numbers: everything here is a pure function of the three files' content."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class ProfileLike(Protocol):
    """The part of kttools.profiling.profile_file.Profile that the report reads."""

    @property
    def header(self) -> dict[str, Any]: ...
    @property
    def stats(self) -> dict[str, dict[str, Array]]: ...


@dataclass(frozen=True, slots=True)
class Series:
    """One curve. points: (x, y, low, high), sorted by x; low and high are nan where there is no interval."""

    name: str
    label: str
    points: list[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Facts:
    """A profile with, where they exist, the table made from it and the evaluation of that table."""

    profile: ProfileLike
    table: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def model_name(self) -> str:
        return str(self.profile.header.get("model", {}).get("name", "model"))

    @cached_property
    def domains(self) -> list[str]:
        return list(self.profile.stats)

    @cached_property
    def moe_layers(self) -> list[int]:
        return [int(layer) for layer in self.profile.header["router"]["moe_layers"]]

    @property
    def k_native(self) -> int:
        return int(self.profile.header["router"]["num_experts_per_tok"])

    @cached_property
    def counts(self) -> Array:
        """Selections [D, L, E]."""
        return np.stack([np.asarray(self.profile.stats[d]["count"], dtype=np.float64) for d in self.domains])

    @cached_property
    def load(self) -> Array:
        """Load relative to an even spread, [D, L, E]: 1 is the average expert of that layer and domain."""
        return self.counts / np.maximum(self.counts.mean(axis=-1, keepdims=True), 1e-300)

    @cached_property
    def pooled_load(self) -> Array:
        """[L, E], every domain with the same weight."""
        return np.asarray(self.load.mean(axis=0))

    @property
    def imbalance(self) -> Array:
        """Busiest expert over the average expert, [L]."""
        return np.asarray(self.pooled_load.max(axis=-1))

    @cached_property
    def divergence(self) -> Array:
        """Jensen-Shannon divergence of the expert load in bits, [L, D, D]."""
        share = self.counts / np.maximum(self.counts.sum(axis=-1, keepdims=True), 1e-300)
        size = len(self.domains)
        out = np.zeros((len(self.moe_layers), size, size))
        for i in range(size):
            for j in range(i):
                out[:, i, j] = out[:, j, i] = jensen_shannon(share[i], share[j])
        return out

    @cached_property
    def hot_coverage(self) -> Array:
        """Share of selections that the n busiest experts of a layer take, [L, E + 1] for n = 0..E."""
        busiest = -np.sort(-self.pooled_load, axis=-1)
        shares = np.cumsum(busiest, axis=-1) / np.maximum(busiest.sum(axis=-1, keepdims=True), 1e-300)
        return np.concatenate([np.zeros((len(shares), 1)), shares], axis=-1)

    @cached_property
    def lru(self) -> list[Series]:
        """Hit rate of a cache of n experts per layer, mean over layers, one curve per domain."""
        curves = []
        for domain in self.domains:
            stats = self.profile.stats[domain]
            if "lru_hits" not in stats:
                return []
            selections = self.k_native * np.asarray(stats["tokens"], dtype=np.float64)
            hits = np.asarray(stats["lru_hits"], dtype=np.float64)
            rate = (hits / np.maximum(selections[:, None], 1)).mean(axis=0)
            sizes = self._lru_sizes(stats)
            points = [(float(n), float(r), math.nan, math.nan) for n, r in zip(sizes, rate, strict=True)]
            curves.append(Series(domain, domain, points))
        return curves

    def _lru_sizes(self, stats: dict[str, Array]) -> list[int]:
        header = self.profile.header
        places = (header, header.get("statistics", {}), header["router"])
        sizes = next((place["lru_sizes"] for place in places if "lru_sizes" in place), None)
        return [int(n) for n in (stats["lru_sizes"] if sizes is None else sizes)]

    @cached_property
    def pareto(self) -> list[Series]:
        """Mean KL over realised mean k, one curve per family of policies (flat, flat-alpha, ser, ...)."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in (self.evaluation or {}).get("pareto", []):
            found.setdefault(family(row["policy"]), []).append(row)
        curves = []
        for name, rows in found.items():
            points = sorted(
                (float(r["k_mean"]), float(r["kl_mean"]), number(r.get("kl_low")), number(r.get("kl_high")))
                for r in rows
                if r["kl_mean"] > 0
            )
            label = FAMILY_LABELS.get(name, str(rows[0].get("label", name)))
            curves.append(Series(name, label, points))
        return [curve for curve in curves if curve.points]

    @property
    def judged(self) -> dict[str, Any] | None:
        """The policy that the evaluation is about."""
        if self.evaluation is None:
            return None
        name = self.evaluation.get("table") or self.evaluation.get("verdict", {}).get("policy")
        return self.policy(name)

    def policy(self, name: str | None) -> dict[str, Any] | None:
        rows = (self.evaluation or {}).get("policies", [])
        return next((row for row in rows if row["name"] == name), None)

    def comparison(
        self, against: str, scope: str = "pooled", policy: str | None = None
    ) -> dict[str, Any] | None:
        """A policy (default: the judged one) against another one."""
        judged = self.judged
        rows = (self.evaluation or {}).get("comparisons", [])
        mine = policy if policy is not None else judged and judged["name"]
        return next(
            (r for r in rows if r["policy"] == mine and r["against"] == against and r["scope"] == scope), None
        )

    @property
    def rivals(self) -> list[str]:
        """Names of what the judged policy was compared with, pooled."""
        judged = self.judged
        rows = (self.evaluation or {}).get("comparisons", [])
        mine = judged and judged["name"]
        return [r["against"] for r in rows if r["scope"] == "pooled" and r["policy"] == mine]

    @property
    def flat_rival(self) -> str | None:
        """The flat, renormalised baseline, the one a table has to beat first."""
        return next((name for name in self.rivals if family(name) == "flat"), None)

    @cached_property
    def k_per_layer(self) -> list[tuple[int, float]]:
        """(layer, experts per token): the table's k, or for adaptive tables the mean that was measured."""
        layers = self.table["policy"]["layers"] if self.table else []
        measured = (self.judged or {}).get("k_mean_by_layer") or {}
        rows = []
        for layer in layers:
            k = layer.get("k")
            k = measured.get(str(layer["layer"])) if k is None else k
            if k is not None:
                rows.append((int(layer["layer"]), float(k)))
        return rows

    @property
    def sensitivity(self) -> dict[int, dict[str, float]]:
        provenance = (self.table or {}).get("provenance", {})
        layers = (provenance.get("sensitivity") or {}).get("layers", {})
        return {int(layer): values for layer, values in layers.items()}

    @property
    def predictions(self) -> list[dict[str, Any]]:
        rows = (self.table or {}).get("provenance", {}).get("predicted") or []
        return [r for r in rows if (r.get("kl_predicted") or 0) > 0 and (r.get("kl_measured") or 0) > 0]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What was tried on the probe documents: ingredient, tried, kl, gain, standard_error, kept."""
        return list((self.table or {}).get("provenance", {}).get("steps") or [])

    @property
    def hot_experts(self) -> dict[int, list[int]]:
        placement = (self.table or {}).get("placement") or {}
        return {int(layer): list(ids) for layer, ids in placement.get("gpu_hot_experts", {}).items()}


FAMILY_LABELS = {
    "flat": "flat k, renormalised",
    "flat-alpha": "flat k + alpha",
    "ser": "-ser, tuned on the test text",
    "top-p": "top-p",
    "naee": "NAEE",
    "static": "static table",
    "adaptive": "adaptive table",
}


def family(policy: str) -> str:
    """A policy's name without its numbers: flat-6-alpha -> flat-alpha."""
    return re.sub(r"[-_]\d+(?:\.\d+)?(?=-|_|$)", "", policy).replace("_", "-")


def jensen_shannon(p: Array, q: Array) -> Array:
    """Divergence in bits along the last axis; 0 for equal distributions, 1 for disjoint ones."""
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.where(p > 0, p * np.log2(p / middle), 0.0).sum(axis=-1)
        right = np.where(q > 0, q * np.log2(q / middle), 0.0).sum(axis=-1)
    return np.asarray(np.clip((left + right) / 2, 0.0, 1.0))


def number(value: Any) -> float:
    return math.nan if value is None else float(value)
