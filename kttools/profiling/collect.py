"""Documents into shards of statistics: one pass at prefill speed, resumable at every shard."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kttools_runtime.errors import InvalidInputError

from .layerwise import HasTokens, LayerRunner, Window, windows
from .probes import sample
from .profile_file import SHARD_FORMAT, VERSION, Arrays, Shard, read_shard, write_shard
from .recorder import recording
from .statistics import Stats, add, layer_statistics, lru_sizes

SHARD_TOKENS = 16384
Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Part:
    """`index`/`count` of the work, 1-based: the shards whose number is index - 1 modulo count."""

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise InvalidInputError(f"shard {self.index}/{self.count}: expected 1/{self.count} or higher")


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


def collect(
    runner: LayerRunner,
    domain: str,
    chosen: Iterable[Window],
    provenance: dict[str, Any],
    output: Path,
    *,
    window_tokens: int,
    model_name: str,
    part: Part = Part(),
    on_tokens: Progress = lambda count: None,
) -> Collected:
    """Records one domain into output/shards; shards that are there already are kept.

    Raises InvalidInputError when a shard that is there was made from other text or another model.
    """
    recorded = kept = 0
    seconds = 0.0
    for number, group in enumerate(split(chosen, SHARD_TOKENS)):
        if number % part.count != part.index - 1:
            continue
        path = output / "shards" / f"{domain}-{number:05d}.safetensors"
        header = _header(runner, domain, number, group, provenance, window_tokens, model_name)
        if path.exists():
            _check_same(path, header)
            kept += header["tokens"]
            on_tokens(header["tokens"])
            continue
        started = time.perf_counter()
        stats = record(runner, group, on_tokens)
        seconds += time.perf_counter() - started
        recorded += header["tokens"]
        write_shard(path, Shard(header, stats, sample(group)))
    return Collected(recorded, kept, seconds)


@torch.inference_mode()
def record(runner: LayerRunner, group: Iterable[Window], on_tokens: Progress = lambda count: None) -> Arrays:
    """Statistics of some windows, every MoE layer stacked on the first axis."""
    config = runner.config
    totals: dict[int, Stats] = {layer: {} for layer in config.moe_layers}
    with contextlib.ExitStack() as stack:
        recorders = {i: stack.enter_context(recording(m)) for i, m in runner.model.moe_layers.items()}
        for window in group:
            hidden = runner.embed(window.token_ids)
            for index in range(runner.num_layers):
                runner.run(index, hidden)
                if index in recorders:
                    seen = recorders[index].take()
                    energy = hidden.square().sum(dim=1)
                    add(totals[index], layer_statistics(seen, energy, config.n_routed_experts))
            on_tokens(len(window.token_ids))
    names = totals[config.moe_layers[0]]
    return {n: torch.stack([totals[i][n] for i in config.moe_layers]).numpy() for n in names}


def _header(
    runner: LayerRunner,
    domain: str,
    number: int,
    group: list[Window],
    provenance: dict[str, Any],
    window_tokens: int,
    model_name: str,
) -> dict[str, Any]:
    config, digest = runner.config, hashlib.sha256()
    for window in group:
        digest.update(f"{window.document}\n{len(window.token_ids)}\n".encode())
        digest.update(window.token_ids.numpy().tobytes())
    facts = (
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "norm_topk_prob",
    )
    router: dict[str, Any] = {name: getattr(config, name) for name in facts}
    router |= {"moe_layers": list(config.moe_layers), "lru_sizes": lru_sizes(config.n_routed_experts)}
    return {
        "format": SHARD_FORMAT,
        "version": VERSION,
        "id": f"{domain}-{number:05d}",
        "domain": domain,
        "documents": len({w.document for w in group}),
        "tokens": sum(len(w.token_ids) for w in group),
        "text_sha256": digest.hexdigest(),
        "fingerprint": runner.fingerprint,
        "model": {"name": model_name},
        "router": router,
        "provenance": provenance,
        "window_tokens": window_tokens,
    }


def _check_same(path: Path, header: dict[str, Any]) -> None:
    there = read_shard(path).header
    for key in ("fingerprint", "text_sha256", "window_tokens"):
        if there[key] != header[key]:
            raise InvalidInputError(
                f"{path}: an earlier run wrote it with another {key}; choose a new -o or remove shards/"
            )
