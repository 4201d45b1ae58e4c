"""What expert deferral costs: a model on devices against itself without it, for every number up to a most."""

from collections.abc import Iterable
from typing import Protocol

import torch

from .run import OnWindow, Predictor, log_probs
from .scores import Tally, compare
from .windows import Window


class Deferring(Predictor, Protocol):
    """The part of kttools_runtime.hybrid's model that is used here."""

    def use_deferral(self, count: int) -> None: ...


def sweep(model: Deferring, windows: Iterable[Window], most: int, on_window: OnWindow) -> dict[int, Tally]:
    """Tallies by number of deferred experts, 1 to most; the reference is the same model with 0."""
    tallies = {count: Tally() for count in range(1, most + 1)}
    try:
        for window in windows:
            targets = torch.tensor(window.token_ids[1:])
            model.use_deferral(0)
            without = log_probs(model, window)
            for count, tally in tallies.items():
                model.use_deferral(count)
                tally.add(window.domain, window.document, compare(log_probs(model, window), without, targets))
            on_window(window.predicted)
    finally:
        model.use_deferral(0)
    return tallies


def as_text(tallies: dict[int, Tally]) -> str:
    """A row for each number, over all domains, with 95 % intervals over documents."""
    lines = [
        f"{'deferred':>8} {'tokens':>8} {'KL':>9} {'95 %':>19} {'top-1':>7} {'perplexity':>11} {'without':>9}"
    ]
    for count, tally in tallies.items():
        score = tally.scores()[-1]
        if score.kl is None or score.top1 is None or score.reference_perplexity is None:
            raise AssertionError("a sweep has a reference")
        span = f"[{score.kl.low:.5f}, {score.kl.high:.5f}]"
        lines.append(
            f"{count:>8} {score.tokens:>8} {score.kl.value:>9.5f} {span:>19} {score.top1.value:>7.2%}"
            f" {score.perplexity.value:>11.3f} {score.reference_perplexity.value:>9.3f}"
        )
    return "\n".join(lines)
