"""How fast policies run, side by side: rounds over all of them, so that a busy machine slows them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .layerwise import LayerRunner, Policies, Window

ROUNDS = 5
PREFILL_TOKENS = 512
DECODE_TOKENS = 16
PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Speed:
    """Median tokens per second of the whole model."""

    prefill: float
    decode: float


@torch.inference_mode()
def speeds(
    runner: LayerRunner, policies: Mapping[str, Policies], windows: list[Window], rounds: int = ROUNDS
) -> dict[str, Speed]:
    """Every policy on the longest window; an empty policy is the native router."""
    longest = max(windows, key=lambda window: len(window.token_ids))
    ids = longest.token_ids[:PREFILL_TOKENS]
    prompt = ids[:PROMPT_TOKENS]
    timed: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in policies}
    for turn in range(rounds + 1):
        for name, chosen in policies.items():
            prefill = _with(runner, chosen, lambda: _prefill(runner, ids))
            decode = _with(runner, chosen, lambda: _decode(runner, prompt))
            if turn:  # the first round warms up
                timed[name][0].append(prefill)
                timed[name][1].append(decode)
    return {name: Speed(statistics.median(p), statistics.median(d)) for name, (p, d) in timed.items()}


def _with(runner: LayerRunner, policies: Policies, run: Callable[[], float]) -> float:
    routers = {index: moe.router for index, moe in runner.model.moe_layers.items()}
    try:
        for index, policy in policies.items():
            routers[index].table = policy
        return run()
    finally:
        for router in routers.values():
            router.table = None


def _prefill(runner: LayerRunner, ids: torch.Tensor) -> float:
    cache = runner.model.new_cache(len(ids))
    started = time.perf_counter()
    runner.model.prefill(ids, cache)
    return len(ids) / (time.perf_counter() - started)


def _decode(runner: LayerRunner, prompt: torch.Tensor) -> float:
    cache = runner.model.new_cache(len(prompt) + DECODE_TOKENS)
    runner.model.prefill(prompt, cache)
    started = time.perf_counter()
    for position in range(DECODE_TOKENS):
        runner.model.decode(int(prompt[position % len(prompt)]), cache)
    return DECODE_TOKENS / (time.perf_counter() - started)
