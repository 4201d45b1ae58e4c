"""Documents into shards of statistics: one pass at prefill speed, resumable at every shard."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kttools_runtime.errors import InvalidInputError, UsageError

from .layerwise import HasTokens, LayerRunner, Window, windows
from .observed import DEFAULT_EVERY
from .probes import sample
from .profile_file import SHARD_FORMAT, VERSION, Arrays, Shard, read_shard, write_shard
from .record import Progress, lengths, record
from .statistics import lru_sizes

SHARD_TOKENS = 16384
ROUTER_FACTS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "norm_topk_prob",
)


@dataclass(frozen=True, slots=True)
class Part:
    """`index`/`count` of the work, 1-based: every count-th shard of all domains, from the index-th on."""

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise UsageError(f"--shard {self.index}/{self.count}: expected 1/{self.count} or higher")

    def of(self, chosen: "Sequence[Task]") -> "list[Task]":
        """This part's share of the tasks."""
        return list(chosen[self.index - 1 :: self.count])


@dataclass(frozen=True, slots=True)
class Recording:
    """How text is recorded; one profile has one way. gram_every: see kttools.profiling.observed."""

    window_tokens: int
    gram_every: int = DEFAULT_EVERY


@dataclass(frozen=True, slots=True)
class Task:
    """One shard to make: everything that its bytes depend on, but the model."""

    path: Path
    header: dict[str, Any]
    group: list[Window]

    @property
    def tokens(self) -> int:
        return int(self.header["tokens"])

    @property
    def gram_every(self) -> int:
        return int(self.header["gram_every"])

    @property
    def is_done(self) -> bool:
        """The shard is there. Raises InvalidInputError when it was made from other text or another model."""
        if not self.path.exists():
            return False
        there = read_shard(self.path).header
        for key in ("fingerprint", "text_sha256", "window_tokens", "gram_every"):
            if there[key] != self.header[key]:
                raise InvalidInputError(
                    f"{self.path}: an earlier run wrote it with another {key}; choose a new -o or remove "
                    "shards/"
                )
        return True

    def finish(self, stats: Arrays) -> None:
        """Writes the shard."""
        write_shard(self.path, Shard(self.header, stats, sample(self.group)))


@dataclass(frozen=True, slots=True)
class Collected:
    """What a run did. seconds covers the recorded tokens only."""

    recorded_tokens: int
    kept_tokens: int
    seconds: float


def split(chosen: Iterable[Window], shard_tokens: int) -> Iterator[list[Window]]:
    """Windows in groups of at least shard_tokens; a document is never in two groups."""
    group: list[Window] = []
    tokens = 0
    for window in chosen:
        if tokens >= shard_tokens and window.document != group[-1].document:
            yield group
            group, tokens = [], 0
        group.append(window)
        tokens += len(window.token_ids)
    if group:
        yield group


def limited(documents: Iterable[HasTokens], document_tokens: int, budget: int | None) -> Iterator[Window]:
    """At most document_tokens of each document, in windows, until the budget is spent."""
    left = budget
    for document in documents:
        if left is not None and left <= 0:
            return
        for window in windows([document], document_tokens):
            yield window
            if left is not None:
                left -= len(window.token_ids)
            break


def tasks(
    runner: LayerRunner,
    domain: str,
    chosen: Iterable[Window],
    provenance: dict[str, Any],
    output: Path,
    *,
    how: Recording,
    model_name: str,
) -> list[Task]:
    """The shards of one domain, into output/shards."""
    found = []
    for number, group in enumerate(split(chosen, SHARD_TOKENS)):
        name = f"{domain}-{number:05d}"
        header = _header(runner, name, domain, group, provenance, how, model_name)
        found.append(Task(output / "shards" / f"{name}.safetensors", header, group))
    return found


def collect(
    runner: LayerRunner, chosen: Sequence[Task], on_tokens: Progress = lambda count: None
) -> Collected:
    """Makes the shards, one after the other; those that are there already are kept.

    Raises InvalidInputError when a shard that is there was made from other text or another model.
    """
    recorded = kept = 0
    seconds = 0.0
    for task in chosen:
        if task.is_done:
            kept += task.tokens
            on_tokens(task.tokens)
            continue
        started = time.perf_counter()
        task.finish(record(runner, task.group, on_tokens, task.gram_every))
        seconds += time.perf_counter() - started
        recorded += task.tokens
    return Collected(recorded, kept, seconds)


def _header(
    runner: LayerRunner,
    name: str,
    domain: str,
    group: list[Window],
    provenance: dict[str, Any],
    how: Recording,
    model_name: str,
) -> dict[str, Any]:
    config, digest = runner.config, hashlib.sha256()
    for window in group:
        digest.update(f"{window.document}\n{len(window.token_ids)}\n".encode())
        digest.update(window.token_ids.numpy().tobytes())
    router: dict[str, Any] = {fact: getattr(config, fact) for fact in ROUTER_FACTS}
    router |= {"moe_layers": list(config.moe_layers), "lru_sizes": lru_sizes(config.n_routed_experts)}
    return {
        "format": SHARD_FORMAT,
        "version": VERSION,
        "id": name,
        "domain": domain,
        "documents": len({w.document for w in group}),
        "tokens": sum(lengths(group)),
        "text_sha256": digest.hexdigest(),
        "fingerprint": runner.fingerprint,
        "model": {"name": model_name},
        "router": router,
        "provenance": provenance,
        "window_tokens": how.window_tokens,
        "gram_every": how.gram_every,
    }
