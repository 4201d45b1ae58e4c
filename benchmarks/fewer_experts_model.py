"""What an expert table gains in a whole model on the CPU: prompts and decode, with and without, in turns.

    python benchmarks/fewer_experts_model.py BUNDLE [--table FILE ...] [--tests pp512,tg48] [-r 5] [-t 2]

Tokens are random. Without --table two are made up: `static` keeps the six heaviest choices of a token,
`adaptive` what is above the threshold that gives a mean of six on the first prompt. Neither is a good table;
speed does not depend on that. A round runs every table once, which first rotates; a ratio is within a round,
and its median over the rounds is printed with its quartiles.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

import kttools_runtime as kt
from kttools_runtime.expert_policy import LayerPolicy
from kttools_runtime.expert_table import read_table
from kttools_runtime.model import Model

MEAN = 6
PROMPT_TOKENS = 64  # before decoding
Rules = dict[int, LayerPolicy] | None


def made_up(model: Model, prompt: torch.Tensor) -> dict[str, Rules]:
    """A static and an adaptive table with a mean of MEAN."""
    seen: list[torch.Tensor] = []
    for moe in model.moe_layers.values():
        moe.watch = lambda _x, _ids, weights: seen.append(weights.clone())
    model.prefill(prompt, model.new_cache(len(prompt)))
    for moe in model.moe_layers.values():
        moe.watch = None
    squares = torch.cat(seen).square().flatten().sort().values
    native, layers = model.config.num_experts_per_tok, model.config.moe_layers
    threshold = float(squares[round(len(squares) * (1 - MEAN / native))])
    static = LayerPolicy(kind="static", k=MEAN)
    adaptive = LayerPolicy(kind="adaptive", k_max=native, threshold=threshold)
    return {"static": dict.fromkeys(layers, static), "adaptive": dict.fromkeys(layers, adaptive)}


def use(model: Model, rules: Rules) -> None:
    for index, moe in model.moe_layers.items():
        moe.router.table = None if rules is None else rules[index]


def seconds(model: Model, test: str, tokens: torch.Tensor) -> float:
    """One prompt (ppN), or N single tokens after a prompt (tgN)."""
    count = int(test[2:])
    if test.startswith("pp"):
        cache = model.new_cache(count)
        start = time.perf_counter()
        model.prefill(tokens[:count], cache)
        return time.perf_counter() - start
    cache = model.new_cache(PROMPT_TOKENS + count)
    model.prefill(tokens[:PROMPT_TOKENS], cache)
    start = time.perf_counter()
    for token in tokens[:count].tolist():
        model.decode(token, cache)
    return time.perf_counter() - start


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--table", type=Path, action="append", default=[])
    parser.add_argument("--tests", default="pp512,tg48", metavar="ppN,tgN,...")
    parser.add_argument("-r", "--repeat", type=int, default=5, help="rounds, after one that warms up")
    parser.add_argument("-t", "--threads", type=int, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = kt.load(options.bundle, threads=options.threads, expert_table="none")
    generator = torch.Generator().manual_seed(3)
    longest = max(PROMPT_TOKENS, *(int(test[2:]) for test in options.tests.split(",")))
    tokens = torch.randint(10, model.config.vocab_size, (longest,), generator=generator)
    rules: dict[str, Rules] = {"no table": None}
    fingerprint = model.fingerprint()
    for path in options.table:
        table = read_table(path, model.config, fingerprint)
        rules[path.name.split(".")[0]] = dict(table.policies)
    if not options.table:
        rules |= made_up(model, tokens[:512])
    for test in options.tests.split(","):
        found: dict[str, list[float]] = {name: [] for name in rules}
        for turn in range(options.repeat + 1):
            names = list(rules)[turn % len(rules) :] + list(rules)[: turn % len(rules)]
            for name in names:
                use(model, rules[name])
                took = seconds(model, test, tokens)
                if turn:
                    found[name].append(took)
        for name, times in found.items():
            ratios = [full / one for full, one in zip(found["no table"], times, strict=True)]
            speed = int(test[2:]) / statistics.median(times)
            print(f"{test:8} {name:20} {speed:9.1f} tokens/s  ratio {quartiles(ratios)}", flush=True)


if __name__ == "__main__":
    main()
