"""bench model: prompt and generation speed of a bundle with llama-bench's tests, beside llama.cpp's."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .llama_bench import LlamaBench
from .report import Record, samples


@dataclass(frozen=True, slots=True)
class SpeedTest:
    """n_prompt tokens at once, or n_gen tokens one by one from an empty cache; the other is 0."""

    n_prompt: int
    n_gen: int

    @property
    def name(self) -> str:
        return f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"

    @property
    def tokens(self) -> int:
        return self.n_prompt + self.n_gen


def speed_tests(prompts: Sequence[int], gens: Sequence[int]) -> list[SpeedTest]:
    """Zeros drop a kind of test, as with llama-bench."""
    return [SpeedTest(n, 0) for n in prompts if n] + [SpeedTest(0, n) for n in gens if n]


def time_once(model: Any, test: SpeedTest, generator: torch.Generator) -> float:
    """Seconds of one run with random tokens and a fresh cache, which is made before the clock starts."""
    cache = model.new_cache(test.tokens)
    tokens = torch.randint(0, model.config.vocab_size, (test.tokens,), generator=generator)
    ids = tokens.tolist()
    start = time.perf_counter()
    if test.n_prompt:
        model.prefill(tokens, cache)
    else:
        for token in ids:
            model.decode(token, cache)
    return time.perf_counter() - start


def warm_up(model: Any, test: SpeedTest, generator: torch.Generator) -> None:
    """Packs in memory, scratch of its full size."""
    reader = model.pack_reader()
    reader.start()
    reader.wait()
    time_once(model, test, generator)


def our_record(bundle: Path, model: Any, test: SpeedTest, seconds: Sequence[float]) -> Record:
    """llama-bench's fields of our run."""
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    return {
        "model_filename": bundle.name,
        "model_type": model_type(bundle),
        "model_size": size,
        "n_threads": model.threads,
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "test": test.name,
        **samples(test.tokens, seconds),
        "engine": "kttools",
        "ratio": None,
    }


def model_type(bundle: Path) -> str:
    """Formats of experts and shards, from the manifest."""
    from kttools_runtime.manifest import load_manifest

    manifest = load_manifest(bundle)
    formats = sorted({name for entry in manifest.experts.values() for name in entry.names})
    linears = sorted(set(manifest.linears.values())) or ["bf16"]
    return f"experts {'+'.join(formats) or 'none'}, shards {'+'.join(linears)}"


def run(
    bundle: Path,
    tests: Sequence[SpeedTest],
    repeat: int,
    peers: Sequence[LlamaBench],
    load: Callable[[], Any],
    notice: Callable[[str], None],
) -> list[Record]:
    """Our record of every test, each followed by one per peer with the ratio of our speed to its.

    Half of our runs come before the peers' and half behind them, so that a drifting clock hits both alike.
    """
    notice(f"loading {bundle}")
    model = load()
    generator = torch.Generator().manual_seed(0)
    records: list[Record] = []
    for test in tests:
        notice(f"{test.name}: kttools")
        warm_up(model, test, generator)
        before = [time_once(model, test, generator) for _ in range((repeat + 1) // 2)]
        theirs = []
        for peer in peers:
            notice(f"{test.name}: llama.cpp on {peer.model.name}")
            theirs.append(peer.measure(test.n_prompt, test.n_gen, model.threads, repeat))
        if peers:
            warm_up(model, test, generator)  # the peer's file has pushed ours out of the caches
        behind = [time_once(model, test, generator) for _ in range(repeat // 2)]
        ours = our_record(bundle, model, test, before + behind)
        records.append(ours)
        for peer, record in zip(peers, theirs, strict=True):
            name, ratio = peer.model.name, ours["avg_ts"] / record["avg_ts"]
            records.append(
                {**record, "model_filename": name, "test": test.name, "engine": "llama.cpp", "ratio": ratio}
            )
    return records
