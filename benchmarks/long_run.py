"""Does memory stay put? 100,000 decode steps of the engine, then as many tokens of chat, on a small model.

    python benchmarks/long_run.py [MODEL] [--steps 100000] [--samples 200] [-t 1] [--json FILE]

MODEL: a bundle or checkpoint, default the sample model (quantised into the cache). The engine decodes one
sequence after another in one cache (`decode`, the cache cut back when it is full); the chat asks one question
after another and streams the answers, as the terminal does, and clears the conversation when the cache is
full. Resident memory is read from /proc at even distances; the line fitted to the samples after the first
quarter gives the growth over the run. Exits 1 when either grows by more than --bound.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kttools_runtime as kt
from kttools.chat.session import ChatOptions, ChatSession
from kttools_runtime.sampling import SamplingParams

SAMPLE = Path(__file__).resolve().parents[1] / "samples" / "ds3-nano"
WARM_UP = 0.25  # of the samples: caches of Python and torch fill, pages of the bundle are touched
BOUND_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One part of the run; growth is the fitted slope times all steps. All in bytes but where named."""

    name: str
    steps: int
    seconds: float
    first_rss: int
    last_rss: int
    peak_anonymous: int
    growth: float
    growth_per_1000_steps: float
    rss: tuple[int, ...]


def growth(steps: list[int], rss: list[int]) -> float:
    """Bytes per step: the slope of the least-squares line through the samples after the warm-up."""
    first = int(len(steps) * WARM_UP)
    x, y = np.array(steps[first:], float), np.array(rss[first:], float)
    x -= x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def measured(name: str, tokens: Iterator[object], steps: int, samples: int) -> Record:
    """Takes `steps` items of `tokens` and looks at this process's memory `samples` times."""
    at: list[int] = []
    rss: list[int] = []
    anonymous: list[int] = []
    every = max(1, steps // samples)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        next(tokens)
        if step % every == 0:
            at.append(step)
            rss.append(memory("VmRSS"))
            anonymous.append(memory("RssAnon"))
    slope = growth(at, rss)
    seconds = time.perf_counter() - started
    return Record(
        name,
        steps,
        round(seconds, 1),
        rss[0],
        rss[-1],
        max(anonymous),
        slope * steps,
        slope * 1000,
        tuple(rss),
    )


def memory(field: str) -> int:
    """A field of this process's /proc status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def engine_tokens(model: Any, cache_len: int = 1024) -> Iterator[int]:
    """Greedy decoding for ever; a full cache is cut back to its first 16 tokens."""
    cache = model.new_cache(cache_len)
    token = int(model.prefill(list(range(3, 19)), cache).argmax())
    while True:
        if cache.length >= cache.capacity:
            cache.truncate(16)
        token = int(model.decode(token, cache).argmax())
        yield token


def chat_tokens(model: Any, cache_len: int = 2048) -> Iterator[int]:
    """Questions and answers for ever, counted by the tokens that the session generated."""
    sampling = SamplingParams(temperature=1.0, seed=7)
    session = ChatSession(
        model, model.tokenizer, cache_len, ChatOptions(sampling=sampling, max_new_tokens=200)
    )
    number = 0
    while True:
        number += 1
        if session.cache.length + 400 > session.cache.capacity:
            session.clear()
        shown = 0
        for _ in session.ask(f"Question {number}: what is a mixture-of-experts model?"):
            produced = session.stats.generated_tokens if session.stats else 0
            yield from range(shown, produced)
            shown = produced


RUNS: dict[str, Callable[[Any], Iterator[int]]] = {"engine": engine_tokens, "chat": chat_tokens}


def bundle_of(path: Path) -> Path:
    """The bundle, or the checkpoint quantised into the cache as chat does."""
    from kttools.families import open_model
    from kttools.model_source import ensure_bundle
    from kttools.quantize.plan import make_plan
    from kttools.quantize.recipe import make_recipe
    from kttools.quantize.writer import Quantizer

    def quantise(source: Path, target: Path, weights: Path | None) -> None:
        Quantizer(
            make_plan(open_model(source, weights), make_recipe("int8", "int4", 128, None), 1), target
        ).run()

    return ensure_bundle(path, quantise)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--bound", type=int, default=BOUND_BYTES, help="bytes of growth over the run")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--only", choices=list(RUNS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = kt.load(bundle_of(given.model), threads=given.threads)
    records = []
    for name, tokens in RUNS.items():
        if given.only not in (None, name):
            continue
        record = measured(name, tokens(model), given.steps, given.samples)
        records.append(record)
        print(
            f"{name:6} {record.steps} steps in {record.seconds:.0f} s: RSS {record.first_rss / 2**20:.1f} -> "
            f"{record.last_rss / 2**20:.1f} MiB, fitted growth {record.growth / 1024:+.0f} KiB over the run",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    return int(any(record.growth > given.bound for record in records))


if __name__ == "__main__":
    sys.exit(main())
