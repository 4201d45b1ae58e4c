"""A step that Ctrl-C ends leaves nothing behind: no hang, and the next one is right."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import kttools_runtime as kt
from tests.compare import assert_close

ROUNDS = 6
KEPT = 5


def interrupted(_: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def go_on(model: Any, tokens: torch.Tensor, cache: Any, seconds: float, is_prompt: bool) -> None:
    """Until the interrupt comes, `seconds` from now."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if is_prompt:
        model.prefill(tokens, cache)
    else:
        for token in tokens.tolist():
            model.decode(token, cache)
    signal.setitimer(signal.ITIMER_REAL, 1e-3)  # the first may have been lost in a destructor
    time.sleep(60)


def test_interrupts_at_any_moment(nano_bundle_bf16: Path) -> None:
    """Prompts and captured steps on two devices, hot and late experts, 0.1 to 25 ms after they began."""
    options: dict[str, Any] = {"device": "cpu:0,cpu:1", "gpu_experts": "5", "defer_experts": 2}
    model = kt.load(nano_bundle_bf16, dtype="float32", threads=1, prefill="cpu", **options)
    tokens = torch.randint(0, model.config.vocab_size, (60,), generator=torch.Generator().manual_seed(3))
    expected = model.logits(tokens[:9])
    cache = model.new_cache(300)
    before = signal.signal(signal.SIGALRM, interrupted)
    try:
        for turn in range(ROUNDS):
            cache.truncate(0)
            for token in tokens[:KEPT].tolist():
                model.decode(token, cache)
            with pytest.raises(KeyboardInterrupt):
                go_on(model, tokens[KEPT:], cache, 1e-4 + 25e-3 * turn / ROUNDS, is_prompt=turn % 3 == 0)
            assert cache.length >= KEPT
            cache.truncate(KEPT)
            rows = torch.stack([model.decode(token, cache) for token in tokens[KEPT:9].tolist()])
            assert_close(rows, expected[KEPT:], 1e-4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
