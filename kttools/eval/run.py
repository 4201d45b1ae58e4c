"""Runs models over windows and tallies what they predict."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kttools_runtime.errors import InvalidInputError

from .reference_file import Answer, Reference, answer_of
from .scores import Tally, compare
from .windows import Window

OnWindow = Callable[[int], object]


class Predictor(Protocol):
    """The part of kttools_runtime.Model that is used here."""

    def logits(self, token_ids: Sequence[int]) -> Tensor: ...


def evaluate(
    model: Predictor, windows: Iterable[Window], reference: Predictor | None, on_window: OnWindow
) -> Tally:
    """Perplexity of the model, and its distance from a reference model where there is one."""
    tally = Tally()
    for window in windows:
        targets = torch.tensor(window.token_ids[1:])
        log_p = log_probs(reference, window) if reference else None
        tally.add(window.domain, window.document, compare(log_probs(model, window), log_p, targets))
        on_window(window.predicted)
    return tally


def evaluate_against_file(model: Predictor, reference: Reference, on_window: OnWindow) -> Tally:
    """The same against what a reference file holds; the file's own tokens are predicted."""
    tally = Tally()
    for window, answer in zip(reference.windows, reference.answers(), strict=True):
        scores = answer.compare(log_probs(model, window), torch.tensor(window.token_ids[1:]))
        tally.add(window.domain, window.document, scores)
        on_window(window.predicted)
    return tally


def answers_of(model: Predictor, windows: Iterable[Window], top_k: int, on_window: OnWindow) -> list[Answer]:
    """What a reference file keeps of the model's predictions."""
    answers = []
    for window in windows:
        answers.append(answer_of(log_probs(model, window), torch.tensor(window.token_ids[1:]), top_k))
        on_window(window.predicted)
    return answers


def check_vocabularies(model_size: int, reference_size: int, where: str) -> None:
    """Raises InvalidInputError when ids cannot mean the same."""
    if model_size != reference_size:
        raise InvalidInputError(f"{where}: vocab_size {reference_size}, the model has {model_size}")


def log_probs(model: Predictor, window: Window) -> Tensor:
    """[T - 1, vocab_size]: row t predicts token t + 1."""
    return torch.log_softmax(model.logits(window.token_ids).float()[:-1], dim=-1).cpu()
