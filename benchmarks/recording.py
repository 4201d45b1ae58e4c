"""What recording costs over plain prefill of the same text, and what sampling the outputs loses.

    python benchmarks/recording.py BUNDLE --data python=jsonl:FILE#text [--data ...] [--tokens 16384] [-t 2]

Every repetition runs, in this process and on the same documents: `prefill`, the runtime's own, a document at
a time; `batched`, the profile's passes without recording; and recording with outputs of one token in N for
each --gram-every. A ratio is that of one repetition, so that both sides saw the same machine; medians are
printed, for CPU time (all threads) and for wall time. Then sampled rank Grams against those of all tokens:
the relative Frobenius error, the predicted error of keeping k of K experts, the scale alpha, the experts'
output norms. Prints a Markdown table, or one JSON document (--json).
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kttools_runtime as kt
from kttools.profiling.data_spec import parse_specs
from kttools.profiling.gather import TextLimits, domain_windows
from kttools.profiling.layerwise import LayerRunner, Window, batches
from kttools.profiling.pricing import prefix_errors, prefix_scales
from kttools.profiling.profile_file import Arrays
from kttools.profiling.record import lengths, record


def prefill(runner: LayerRunner, chosen: list[Window]) -> None:
    model = runner.model
    for window in chosen:
        model.prefill(window.token_ids, model.new_cache(len(window.token_ids)))


@torch.inference_mode()
def batched(runner: LayerRunner, chosen: list[Window]) -> None:
    states = [
        (lengths(batch), runner.embed(torch.cat([w.token_ids for w in batch]))) for batch in batches(chosen)
    ]
    for index in range(runner.num_layers):
        for sizes, hidden in states:
            runner.run(index, hidden, lengths=sizes)


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds of all threads, wall seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(runner: LayerRunner, chosen: list[Window], every: list[int], repeat: int) -> list[dict[str, Any]]:
    calls: dict[str, Callable[[], Any]] = {
        "prefill": lambda: prefill(runner, chosen),
        "batched": lambda: batched(runner, chosen),
    }
    for n in every:
        calls[f"recording, N = {n}"] = lambda n=n: record(runner, chosen, gram_every=n)  # type: ignore[misc]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(repeat + 1):
        for name, call in calls.items():
            sample = timed(call)
            if number:  # the first round warms up
                found[name].append(sample)
    tokens = sum(lengths(chosen))
    rows = []
    for name, samples in found.items():
        row: dict[str, Any] = {"run": name, "tokens_per_second": tokens / min(wall for _, wall in samples)}
        row["tokens_per_cpu_second"] = tokens / min(cpu for cpu, _ in samples)
        for base in ("prefill", "batched"):
            pairs = list(zip(samples, found[base], strict=True))
            row[f"cpu_over_{base}"] = statistics.median(own[0] / other[0] for own, other in pairs)
            row[f"wall_over_{base}"] = statistics.median(own[1] / other[1] for own, other in pairs)
        rows.append(row)
    return rows


def losses(runner: LayerRunner, domains: dict[str, list[Window]], every: list[int]) -> list[dict[str, Any]]:
    """Sampled against complete, domains weighted alike."""
    full = {name: record(runner, chosen, gram_every=1) for name, chosen in domains.items()}
    return [
        {"every": n} | loss(full, {name: record(runner, w, gram_every=n) for name, w in domains.items()})
        for n in every
        if n > 1
    ]


def loss(full: dict[str, Arrays], found: dict[str, Arrays]) -> dict[str, float]:
    def gram(profile: dict[str, Arrays]) -> torch.Tensor:
        rows = [stats["gram_weight"] / stats["tokens"][:, None, None] for stats in profile.values()]
        return torch.from_numpy(np.mean(rows, axis=0))

    def norms(profile: dict[str, Arrays]) -> np.ndarray:
        above, below = (sum(s[name] for s in profile.values()) for name in ("sum_norm2", "observed_count"))
        return np.sqrt(above / np.maximum(below, 1e-9))

    exact, sampled = gram(full), gram(found)
    errors = [torch.stack([prefix_errors(g) for g in one])[:, :-1] for one in (exact, sampled)]
    scales = [torch.stack([prefix_scales(g) for g in one]) for one in (exact, sampled)]
    change = (errors[1] / errors[0] - 1).abs()
    norm = np.abs(norms(found) / norms(full) - 1)
    return {
        "observed_tokens": sum(float(s["observed"][0]) for s in found.values()),
        "gram_frobenius": float((sampled - exact).norm() / exact.norm()),
        "error_mean": float(change.mean()),
        "error_max": float(change.max()),
        "alpha_max": float((scales[1] - scales[0]).abs().max()),
        "norm_median": float(np.median(norm)),
        "norm_p99": float(np.quantile(norm, 0.99)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", action="append", required=True, metavar="SPEC")
    parser.add_argument("--tokens", type=int, default=16384, help="per domain (default 16384)")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--gram-every", default="1,4,8,16", metavar="N,N,...")
    parser.add_argument("-r", "--repeat", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    every = [int(part) for part in options.gram_every.split(",")]
    runner = LayerRunner(kt.load(options.bundle, threads=options.threads, expert_table="none"))
    limits = TextLimits(options.window, options.tokens)
    domains = {spec.domain: domain_windows(runner, spec, limits) for spec in parse_specs(options.data)}
    chosen = [window for windows in domains.values() for window in windows]
    document = {
        "bundle": options.bundle.name,
        "tokens": sum(lengths(chosen)),
        "documents": len(chosen),
        "threads": runner.model.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "repeat": options.repeat,
        "runs": measure(runner, chosen, every, options.repeat),
        "losses": losses(runner, domains, every),
    }
    if options.json:
        json.dump(document, sys.stdout, indent=1)
        print()
        return
    print(f"{document['documents']} documents, {document['tokens']} tokens, {document['threads']} threads\n")
    for rows in (document["runs"], document["losses"]):
        table(rows)


def table(rows: list[dict[str, Any]]) -> None:
    if rows:
        print("| " + " | ".join(rows[0]) + " |\n|" + "--|" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(v if isinstance(v, str) else f"{v:.4g}" for v in row.values()) + " |")
        print()


if __name__ == "__main__":
    main()
