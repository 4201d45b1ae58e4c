"""What dropping experts gains in the engine: top-8 against a mean of 6, same layer, same rows, in turns.

    python benchmarks/fewer_experts.py [--shape v3] [--format int8] [--tokens 1,512] [-r 40] [-t 2]

Every round draws tokens and eight distinct experts for each, and times three calls: all eight; the first six
of each (a static table of 6); and 4 to 8 of them, 6 on average, the dropped ones given as id -1 (an adaptive
table). Which call comes first rotates. A round's ratio is top-8's time over the other's; the median over the
rounds is printed with its quartiles. At one token a round's count is 4, 5, 6, 7 or 8 in turn, and the
adaptive ratio is that of the sums over five rounds.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from kttools.bench.experts import random_ids
from kttools.bench.layer import random_layer
from kttools.bench.shapes import LayerShape, parse_shape
from kttools_runtime.experts import ExpertEngine, ExpertLayer

COUNTS = (4, 8, 5, 7, 6)  # a mean of 6 over every five
MEAN = 6


def dropped(ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """ids [T, 8] with -1 from counts[t] on."""
    return ids.masked_fill(torch.arange(ids.shape[1]) >= counts[:, None], -1)


def rounds(layer: ExpertLayer, shape: LayerShape, num_tokens: int, repeat: int) -> Iterator[dict[str, float]]:
    """Seconds of the three calls, round by round."""
    generator = torch.Generator().manual_seed(1)
    cycle = itertools.cycle(COUNTS)
    out = torch.zeros(num_tokens, shape.hidden_size)
    for number in range(repeat):
        x = torch.randn(num_tokens, shape.hidden_size, generator=generator).to(torch.bfloat16)
        ids = random_ids(generator, num_tokens, shape)
        weights = torch.rand(num_tokens, shape.top_k, generator=generator)
        counts = torch.tensor([next(cycle) for _ in range(num_tokens)])
        calls = {
            "all": (ids, weights),
            "static": (ids[:, :MEAN].contiguous(), weights[:, :MEAN].contiguous()),
            "adaptive": (dropped(ids, counts), weights),
        }
        names = list(calls)
        seconds = {}
        for name in names[number % 3 :] + names[: number % 3]:
            start = time.perf_counter()
            layer.forward(x, *calls[name], out)
            seconds[name] = time.perf_counter() - start
        yield seconds


def summary(num_tokens: int, found: list[dict[str, float]]) -> dict[str, Any]:
    """The adaptive counts come in fives: at one token only five rounds together have the mean."""
    fives = [
        {name: sum(one[name] for one in found[i : i + 5]) for name in found[0]}
        for i in range(0, len(found) - 4, 5)
    ]
    row: dict[str, Any] = {
        "tokens": num_tokens,
        "rounds": len(found),
        "all_ms": 1e3 * statistics.median(one["all"] for one in found),
    }
    for name, source in (("static", found), ("adaptive", fives)):
        ratios = [one["all"] / one[name] for one in source]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row |= {f"{name}_ratio": middle, f"{name}_quartiles": [low, high]}
        row[f"{name}_ratio_of_best"] = min(one["all"] for one in source) / min(one[name] for one in source)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="v3")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--format", default="int8")
    parser.add_argument("--tokens", default="1,512", metavar="N,N,...")
    parser.add_argument("-r", "--repeat", type=int, default=40, help="rounds at one token, an eighth above")
    parser.add_argument("-t", "--threads", type=int, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = ExpertEngine(options.threads)
    shape = parse_shape(options.shape, options.experts, 8)
    layer = random_layer(engine, shape, options.format).layer
    rows = []
    for num_tokens in map(int, options.tokens.split(",")):
        repeat = options.repeat if num_tokens == 1 else max(10, options.repeat // 8)
        rows.append(summary(num_tokens, list(rounds(layer, shape, num_tokens, repeat + 5))[5:]))
    document = {
        "shape": [shape.hidden_size, shape.moe_intermediate_size, shape.num_experts],
        "format": options.format,
        "threads": engine.threads,
        "isa": engine.isa,
        "machine": platform.machine(),
        "rows": rows,
    }
    json.dump(document, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
