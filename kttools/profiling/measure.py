"""How far a policy's predictions are from the full model's: sums per document, for any set of policies."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kttools_runtime.expert_policy import LayerPolicy

from .layerwise import LayerRunner, Policies, Window
from .spill import Rows, hold

# Rows of logits compared at a time: small enough for the cache of a vocabulary of 8k, bounded for 129k.
LOGIT_BYTES = 16 << 20


class Counting:
    """A layer's policy that also counts what it keeps (None: the native choice)."""

    def __init__(self, policy: LayerPolicy) -> None:
        self.policy = policy
        self.kept = 0

    def select(self, ids: Tensor, weights: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        kept_ids, kept_weights = self.policy.select(ids, weights, scores)
        self.kept += int((kept_ids >= 0).sum())
        return kept_ids, kept_weights


@dataclass(slots=True)
class DocumentSums:
    """Sums over the predicted tokens of one document under one policy."""

    domain: str
    document: str
    tokens: int = 0
    kl: float = 0.0
    nll: float = 0.0
    nll_full: float = 0.0
    top1: float = 0.0
    overlap: float = 0.0

    def add(self, sums: "TokenSums") -> None:
        self.tokens += sums.kl.shape[0]
        self.kl += float(sums.kl.sum(dtype=torch.float64))
        self.nll += float(sums.nll.sum(dtype=torch.float64))
        self.nll_full += float(sums.nll_full.sum(dtype=torch.float64))
        self.top1 += float(sums.top1.sum(dtype=torch.float64))
        self.overlap += float(sums.overlap.sum(dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Per predicted token, float32 [T - 1]."""

    kl: Tensor
    nll: Tensor
    nll_full: Tensor
    top1: Tensor
    overlap: Tensor


@dataclass(slots=True)
class Measured:
    """One policy on all windows. token_kl: every token's, by domain; kept: experts by domain, layer."""

    documents: list[DocumentSums] = field(default_factory=list)
    token_kl: dict[str, list[Tensor]] = field(default_factory=dict)
    kept: dict[str, dict[int, int]] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def kl_mean(self) -> float:
        return sum(d.kl for d in self.documents) / sum(d.tokens for d in self.documents)

    def k_mean(self, domain: str | None = None) -> float:
        """Realised mean number of experts per token and MoE layer."""
        chosen = [domain] if domain is not None else list(self.kept)
        kept = sum(sum(self.kept[d].values()) for d in chosen)
        layers = len(next(iter(self.kept.values())))
        return kept / (layers * sum(self.positions[d] for d in chosen))

    def kl_vector(self) -> tuple[Tensor, Tensor]:
        """(KL sums, tokens) by document, float64."""
        return (
            torch.tensor([d.kl for d in self.documents], dtype=torch.float64),
            torch.tensor([d.tokens for d in self.documents], dtype=torch.float64),
        )


@torch.inference_mode()
def compare_tokens(runner: LayerRunner, full: Tensor, other: Tensor, token_ids: Tensor) -> TokenSums:
    """Final hidden states of both [T, hidden_size] -> what each position's prediction lost."""
    rows = max(1, LOGIT_BYTES // (4 * runner.config.vocab_size))
    pieces: list[TokenSums] = []
    for start in range(0, len(token_ids) - 1, rows):
        end = min(start + rows, len(token_ids) - 1)
        targets = token_ids[start + 1 : end + 1, None]
        log_p = runner.logits(full[start:end]).log_softmax(dim=1)
        log_q = runner.logits(other[start:end]).log_softmax(dim=1)
        p = log_p.exp()
        pieces.append(
            TokenSums(
                kl=(p * (log_p - log_q)).sum(dim=1),
                nll=-log_q.gather(1, targets)[:, 0],
                nll_full=-log_p.gather(1, targets)[:, 0],
                top1=(log_p.argmax(dim=1) == log_q.argmax(dim=1)).float(),
                overlap=torch.minimum(p, log_q.exp()).sum(dim=1),
            )
        )
    fields = TokenSums.__dataclass_fields__
    return TokenSums(**{name: torch.cat([getattr(p, name) for p in pieces]) for name in fields})


class Store(Protocol):
    """Where measurements are kept (see kttools.profiling.measured_file)."""

    directory: Path

    def get(self, policies: Policies) -> Measured | None: ...
    def put(self, policies: Policies, measured: Measured) -> None: ...
    def part(self, chosen: Sequence[Window]) -> "Store": ...


class Judge:
    """Measures policies on fixed windows; the full model runs once. store: what is in it is not run again.

    The full model's hidden states, 28 GB for a million tokens of DeepSeek-V3, lie in a file in the store's
    directory where they are many (see kttools.profiling.spill).
    """

    def __init__(self, runner: LayerRunner, chosen: Sequence[Window], store: Store | None = None) -> None:
        self.runner = runner
        self.windows = list(chosen)
        self.store = store
        self.seconds_full = 0.0
        self._full: Rows | None = None

    @property
    def full(self) -> Rows:
        """Final hidden states of the full model by window. Raises ResourceError when the disk is too full."""
        if self._full is None:
            started = time.perf_counter()
            rows = sum(len(w.token_ids) for w in self.windows)
            made = (self._forward(w, {})[0] for w in self.windows)
            folder = None if self.store is None else self.store.directory
            self._full = hold(made, rows, self.runner.config.hidden_size, folder)
            self.seconds_full = time.perf_counter() - started
        return self._full

    def part(self, every: int) -> "Judge":
        """A judge of one window of `every`."""
        chosen = self.windows[::every]
        judge = Judge(self.runner, chosen, None if self.store is None else self.store.part(chosen))
        if self._full is not None:
            judge._full = self._full[::every]
        return judge

    def measure(self, policies: Policies) -> Measured:
        """One policy on all windows."""
        if self.store is not None and (found := self.store.get(policies)) is not None:
            return found
        result = self._measure(policies)
        if self.store is not None:
            self.store.put(policies, result)
        return result

    def _measure(self, policies: Policies) -> Measured:
        result = Measured()
        lengths = [len(window.token_ids) - 1 for window in self.windows]
        # Made before the rows of logits: a small block that stays among those freed would split the hole they
        # leave, and every window could take 16 MB more.
        rows = torch.empty(sum(lengths)).split(lengths)
        for window, full, token_kl in zip(self.windows, self.full, rows, strict=True):
            started = time.perf_counter()
            hidden, kept = self._forward(window, policies)
            result.seconds += time.perf_counter() - started
            sums = compare_tokens(self.runner, full, hidden, window.token_ids)
            token_kl.copy_(sums.kl)
            result.token_kl.setdefault(window.domain, []).append(token_kl)
            self._record(result, window, sums, kept)
        return result

    def _forward(self, window: Window, policies: Policies) -> tuple[Tensor, dict[int, int]]:
        runner, kept = self.runner, {}
        hidden = runner.embed(window.token_ids)
        for index in range(runner.num_layers):
            counting = Counting(policies[index]) if index in policies else None
            runner.run(index, hidden, counting)
            if runner.moe(index) is not None:
                native = runner.config.num_experts_per_tok * len(window.token_ids)
                kept[index] = counting.kept if counting else native
        return hidden, kept

    def _record(self, result: Measured, window: Window, sums: TokenSums, kept: dict[int, int]) -> None:
        last = result.documents[-1] if result.documents else None
        if last is None or (last.domain, last.document) != (window.domain, window.document):
            last = DocumentSums(window.domain, window.document)
            result.documents.append(last)
        last.add(sums)
        total = result.kept.setdefault(window.domain, dict.fromkeys(kept, 0))
        for index, number in kept.items():
            total[index] += number
        positions = result.positions.get(window.domain, 0)
        result.positions[window.domain] = positions + len(window.token_ids)
