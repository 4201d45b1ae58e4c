"""The certificate: policies against the full model, with intervals, and a verdict."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kttools_runtime.version import __version__

from .bootstrap import CONFIDENCE, REPLICATES, SEED, Bootstrap, holm, interval, two_sided_p
from .layerwise import Policies
from .measure import Judge, Measured
from .speed import Speed

FORMAT, VERSION = "kttools-expert-evaluation", 1
# Largest distance of a realised mean from its target, on the evaluation data, at which a table may pass.
MEAN_TOLERANCE = 0.02
SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy and what it measured."""

    name: str
    label: str
    policies: Policies
    measured: Measured
    is_baseline: bool


class Comparison:
    """All contenders on the same documents, and the comparisons between them."""

    def __init__(
        self, judge: Judge, contenders: list[Contender], speeds: Mapping[str, Speed] | None = None
    ) -> None:
        self.judge = judge
        self.speeds = speeds or {}
        self.contenders = {c.name: c for c in contenders}
        documents = contenders[0].measured.documents
        self.domains = sorted({d.domain for d in documents})
        self.tokens = np.array([d.tokens for d in documents], dtype=np.float64)
        self.bootstrap = Bootstrap([d.domain for d in documents])

    def policy_document(self, contender: Contender) -> dict[str, Any]:
        measured = contender.measured
        layers = sorted(next(iter(measured.kept.values())))
        positions = sum(measured.positions.values())
        speed = self.speeds.get(contender.name)
        first = next(iter(contender.policies.values()))
        return {
            "name": contender.name,
            "label": contender.label,
            "kind": first.kind,
            "is_baseline": contender.is_baseline,
            "parameters": {
                "order": first.order,
                "renormalize": first.renormalize,
                "threshold": first.threshold,
                "k": [p.k for p in contender.policies.values()],
            },
            "k_mean": measured.k_mean(),
            "k_mean_by_domain": {d: measured.k_mean(d) for d in self.domains},
            "k_mean_by_layer": {
                str(i): sum(kept[i] for kept in measured.kept.values()) / positions for i in layers
            },
            "tokens_per_second": None if speed is None else speed.prefill,
            "decode_tokens_per_second": None if speed is None else speed.decode,
            "metrics": {
                "pooled": self.metrics(measured, None),
                "domains": {d: self.metrics(measured, d) for d in self.domains},
            },
        }

    def metrics(self, measured: Measured, domain: str | None) -> dict[str, float]:
        """One policy on all documents, or on those of one domain."""
        rows = measured.documents
        kl = interval(*self.bootstrap.ratio(_column(rows, "kl"), self.tokens, domain))
        change = _column(rows, "nll") - _column(rows, "nll_full")
        loss = interval(*self.bootstrap.ratio(change, self.tokens, domain))
        token_kl = [k for d, ks in measured.token_kl.items() if domain in (None, d) for k in ks]
        top1 = interval(*self.bootstrap.ratio(_column(rows, "top1"), self.tokens, domain))
        overlap = interval(*self.bootstrap.ratio(_column(rows, "overlap"), self.tokens, domain))
        return {
            "tokens": sum(row.tokens for row in rows if domain in (None, row.domain)),
            "kl_mean": kl.value,
            "kl_low": kl.low,
            "kl_high": kl.high,
            "kl_p99": float(np.percentile(torch.cat(token_kl).numpy(), 99)),
            "perplexity_ratio": float(np.exp(loss.value)),
            "perplexity_ratio_low": float(np.exp(loss.low)),
            "perplexity_ratio_high": float(np.exp(loss.high)),
            "top1_agreement": top1.value,
            "top1_agreement_low": top1.low,
            "top1_agreement_high": top1.high,
            "overlap": overlap.value,
            "overlap_low": overlap.low,
            "overlap_high": overlap.high,
        }

    def compare(self, name: str, against: str) -> list[dict[str, Any]]:
        """Paired differences of mean KL, pooled and by domain; Holm over the domains."""
        ours = _column(self.contenders[name].measured.documents, "kl")
        theirs = _column(self.contenders[against].measured.documents, "kl")
        rows: list[dict[str, Any]] = []
        p_values: dict[str, float] = {}
        for scope in ["pooled", *self.domains]:
            domain = None if scope == "pooled" else scope
            value, draws = self.bootstrap.ratio(ours - theirs, self.tokens, domain)
            ratio = interval(*self.bootstrap.ratio(ours, theirs, domain))
            difference = interval(value, draws)
            p_value = two_sided_p(draws)
            if domain is not None:
                p_values[scope] = p_value
            rows.append(
                {
                    "policy": name,
                    "against": against,
                    "scope": scope,
                    "kl_difference": difference.value,
                    "low": difference.low,
                    "high": difference.high,
                    "ratio": ratio.value,
                    "ratio_low": ratio.low,
                    "ratio_high": ratio.high,
                    "p_value": p_value,
                }
            )
        adjusted = holm(p_values)
        for row in rows:
            row["p_holm"] = adjusted.get(row["scope"], row["p_value"])
            is_sure = row["p_holm"] < SIGNIFICANCE
            row["is_worse"] = is_sure and row["kl_difference"] > 0
            row["is_better"] = is_sure and row["kl_difference"] < 0
        return rows

    def facts(self, comparisons: list[dict[str, Any]]) -> dict[str, Any]:
        """What evaluation.json says whoever was judged."""
        policies = [self.policy_document(c) for c in self.contenders.values()]
        full = self.speeds.get("full")
        return {
            "format": FORMAT,
            "version": VERSION,
            "tool": {"name": "kttools", "version": __version__},
            "k_mean_tolerance": MEAN_TOLERANCE,
            "reference": {
                "k_mean": float(self.judge.runner.config.num_experts_per_tok),
                "perplexity": self._reference_perplexity(),
                "tokens_per_second": None if full is None else full.prefill,
                "decode_tokens_per_second": None if full is None else full.decode,
            },
            "policies": policies,
            "comparisons": comparisons,
            "pareto": [pareto_point(p) for p in policies],
            "bootstrap": {
                "replicates": REPLICATES,
                "confidence": CONFIDENCE,
                "seed": SEED,
                "unit": "document",
            },
        }

    def _reference_perplexity(self) -> dict[str, Any]:
        rows = next(iter(self.contenders.values())).measured.documents

        def perplexity(domain: str | None) -> float:
            chosen = [row for row in rows if domain in (None, row.domain)]
            return float(np.exp(sum(r.nll_full for r in chosen) / sum(r.tokens for r in chosen)))

        return {"pooled": perplexity(None), "domains": {d: perplexity(d) for d in self.domains}}


class Evaluation(Comparison):
    """The certificate of tables. mean: the realised mean number of experts they are compared at."""

    def __init__(
        self,
        judge: Judge,
        contenders: list[Contender],
        mean: float,
        speeds: Mapping[str, Speed] | None = None,
    ) -> None:
        super().__init__(judge, contenders, speeds)
        self.mean = mean

    def verdict(self, name: str, comparisons: list[dict[str, Any]], max_kl: float | None) -> dict[str, Any]:
        """PASS: at the asked mean, surely below every baseline compared with, surely worse in no domain, and
        the floor held. comparisons: those of the policy with the baselines that count."""
        reasons = []
        realised = self.contenders[name].measured.k_mean()
        if not abs(realised - self.mean) <= MEAN_TOLERANCE:
            reasons.append(
                f"the realised mean on the evaluation data is {realised:.3f}, not {self.mean:g} +- "
                f"{MEAN_TOLERANCE:g}"
            )
        for row in comparisons:
            rival = self.contenders[row["against"]].measured.k_mean()
            if row["scope"] == "pooled" and not rival >= realised - MEAN_TOLERANCE:
                reasons.append(f"{row['against']} ran with fewer experts ({rival:.3f}): no fair comparison")
            if row["scope"] == "pooled" and not row["high"] < 0:
                reasons.append(f"not surely below {row['against']}: difference up to {row['high']:+.5f}")
            if row["scope"] != "pooled" and row["is_worse"]:
                reasons.append(f"worse than {row['against']} on {row['scope']}")
        kl = self.contenders[name].measured.kl_mean
        if max_kl is not None and not kl <= max_kl:
            reasons.append(f"mean KL {kl:.5f} is above the floor of {max_kl}")
        return {"pass": not reasons, "reasons": reasons, "policy": name}

    def document(
        self, table: str, facts: dict[str, Any], compared: list[str], max_kl: float | None
    ) -> dict[str, Any]:
        """evaluation.json. facts: fingerprint, model, data. compared: the baselines of the verdict."""
        judged = [c.name for c in self.contenders.values() if not c.is_baseline]
        others = [name for name in self.contenders if name not in judged and name != compared[0]]
        comparisons = [row for name in judged for against in compared for row in self.compare(name, against)]
        comparisons += [row for name in others for row in self.compare(name, compared[0])]
        verdicts = {
            name: self.verdict(name, [row for row in comparisons if row["policy"] == name], max_kl)
            for name in judged
        }
        return {
            **self.facts(comparisons),
            **facts,
            "table": table,
            "k_mean_target": self.mean,
            "verdicts": verdicts,
            "verdict": verdicts[table],
        }


def pareto_point(policy: dict[str, Any]) -> dict[str, Any]:
    """What the plot of KL against mean experts shows of a policy."""
    pooled = policy["metrics"]["pooled"]
    names = ("kl_mean", "kl_low", "kl_high", "perplexity_ratio")
    point = {"policy": policy["name"], "label": policy["label"], "k_mean": policy["k_mean"]}
    return point | {name: pooled[name] for name in names}


def _column(rows: list[Any], name: str) -> np.ndarray:
    return np.array([getattr(row, name) for row in rows], dtype=np.float64)
