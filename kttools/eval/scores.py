"""Sums over predicted tokens, document by document, and what they say, with intervals."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kttools.profiling.bootstrap import Bootstrap, Interval, interval

REPLICATES = 2000
ALL = "all"


@dataclass(slots=True)
class DocumentSums:
    """Of one document. kl, agreed, reference_nll: None without a reference."""

    domain: str
    document: str
    tokens: int = 0
    nll: float = 0.0
    kl: float | None = None
    agreed: float | None = None
    reference_nll: float | None = None


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per predicted token, float32 [T - 1]; the last three None without a reference."""

    nll: Tensor
    kl: Tensor | None = None
    agreed: Tensor | None = None
    reference_nll: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """One domain, or all of them. Intervals are 95 % bootstrap intervals over documents."""

    domain: str
    tokens: int
    documents: int
    perplexity: Interval
    kl: Interval | None = None
    top1: Interval | None = None
    reference_perplexity: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "domain": self.domain,
            "tokens": self.tokens,
            "documents": self.documents,
        }
        for name in ("perplexity", "kl", "top1", "reference_perplexity"):
            found: Interval | None = getattr(self, name)
            if found is not None:
                document[name] = {"value": found.value, "low": found.low, "high": found.high}
        return document


@dataclass(slots=True)
class Tally:
    """Collects token scores by document, in the order they come."""

    sums: dict[tuple[str, str], DocumentSums] = field(default_factory=dict)

    def add(self, domain: str, document: str, scores: TokenScores) -> None:
        entry = self.sums.setdefault((domain, document), DocumentSums(domain, document))
        entry.tokens += scores.nll.shape[0]
        entry.nll += _total(scores.nll)
        for name in ("kl", "agreed", "reference_nll"):
            values: Tensor | None = getattr(scores, name)
            if values is not None:
                setattr(entry, name, (getattr(entry, name) or 0.0) + _total(values))

    def scores(self) -> list[Score]:
        """One per domain in order, and one over all when there are several."""
        documents = list(self.sums.values())
        bootstrap = Bootstrap([entry.domain for entry in documents], REPLICATES)
        domains: list[str | None] = list(dict.fromkeys(entry.domain for entry in documents))
        if len(domains) > 1:
            domains.append(None)
        return [_score(documents, bootstrap, domain) for domain in domains]


def compare(log_q: Tensor, log_p: Tensor | None, targets: Tensor) -> TokenScores:
    """Model log_q and reference log_p: [T, vocab_size] log probabilities; targets: [T] ids."""
    nll = -log_q.gather(1, targets[:, None])[:, 0]
    if log_p is None:
        return TokenScores(nll)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    agreed = (log_p.argmax(-1) == log_q.argmax(-1)).float()
    return TokenScores(nll, kl, agreed, -log_p.gather(1, targets[:, None])[:, 0])


def _score(documents: list[DocumentSums], bootstrap: Bootstrap, domain: str | None) -> Score:
    mine = [entry for entry in documents if domain in (None, entry.domain)]
    tokens = np.array([entry.tokens for entry in documents], dtype=np.float64)

    def mean(name: str, is_exponential: bool = False) -> Interval | None:
        if getattr(documents[0], name) is None:
            return None
        above = np.array([getattr(entry, name) for entry in documents], dtype=np.float64)
        value, replicates = bootstrap.ratio(above, tokens, domain)
        return (
            interval(math.exp(value), np.exp(replicates)) if is_exponential else interval(value, replicates)
        )

    perplexity = mean("nll", is_exponential=True)
    assert perplexity is not None
    return Score(
        domain or ALL,
        sum(entry.tokens for entry in mine),
        len(mine),
        perplexity,
        mean("kl"),
        mean("agreed"),
        mean("reference_nll", is_exponential=True),
    )


def as_text(scores: Iterable[Score]) -> str:
    """A table; a second line per domain has the intervals."""
    lines = [f"{'domain':<14} {'tokens':>8} {'perplexity':>11} {'reference':>11} {'KL':>10} {'top-1':>9}"]
    for score in scores:
        cells = (score.perplexity, score.reference_perplexity, score.kl, score.top1)
        formats = ("{:.3f}", "{:.3f}", "{:.5f}", "{:.2%}")
        values = [f.format(cell.value) if cell else "-" for f, cell in zip(formats, cells, strict=True)]
        lines.append(f"{score.domain:<14.14} {score.tokens:>8} " + _row(values))
        spans = [
            f"{f.format(cell.low)}..{f.format(cell.high)}" if cell else ""
            for f, cell in zip(formats, cells, strict=True)
        ]
        names = ("perplexity", "reference", "KL", "top-1")
        said = "  ".join(f"{name} {span}" for name, span in zip(names, spans, strict=True) if span)
        lines.append(f"  95 % intervals over {score.documents} documents: {said}")
    return "\n".join(lines)


def _row(values: list[str]) -> str:
    return " ".join(value.rjust(width) for value, width in zip(values, (11, 11, 10, 9), strict=True))


def _total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
