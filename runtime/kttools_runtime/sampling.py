"""From logits to the next token id.

Order: repetition penalty, temperature, top-k, top-p, min-p, draw. This is the order of transformers, for
which model authors publish their recommended values (llama.cpp applies the temperature last). temperature 0
is greedy: the penalty still applies, the filters cannot change the result.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import EngineError, UsageError

# Widths tried before sorting the whole vocabulary for top-p: the nucleus is nearly always in the first.
NUCLEUS_WIDTHS = (256, 4096)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token. Raises UsageError when a value is out of range."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off; relative to the most likely token
    repetition_penalty: float = 1.0  # 1: off; over every token of prompt and answer
    seed: int | None = None  # None: a new one each time

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_k", self.top_k, 0, 1 << 31)
        _in_range("top_p", self.top_p, 0.0, 1.0, low_excluded=True)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_excluded=True)
        if self.seed is not None:
            _in_range("seed", self.seed, 0, (1 << 63) - 1)


def _in_range(name: str, value: float, low: float, high: float, low_excluded: bool = False) -> None:
    if not low <= value <= high or (low_excluded and value == low):  # written so that NaN fails
        bracket = "(" if low_excluded else "["
        raise UsageError(f"{name} must be in {bracket}{low:g}, {high:g}], got {value}")


class Sampler:
    """Draws tokens for one sequence.

    history: ids the repetition penalty counts from the start (the prompt); ids it returns are added.
    """

    def __init__(self, params: SamplingParams, history: Iterable[int] = ()) -> None:
        self.params = params
        self._seen = set(history)
        self._generator = torch.Generator(device="cpu")
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def sample(self, logits: Tensor) -> int:
        """The next token id. logits: [vocab_size], any float dtype and device.

        Raises EngineError when the logits hold NaN or +inf, or no finite value at all.
        """
        scores = self._penalised(_checked(logits))
        if self.params.temperature == 0:
            token_id = int(scores.argmax())
        else:
            probabilities, ids = candidates(scores, self.params)
            drawn = torch.multinomial(probabilities, 1, generator=self._generator)
            token_id = int(ids[drawn])
        self._seen.add(token_id)
        return token_id

    def _penalised(self, scores: Tensor) -> Tensor:
        """Divides positive and multiplies negative logits of seen ids by the penalty (Keskar et al. 2019)."""
        penalty = self.params.repetition_penalty
        if penalty == 1.0 or not self._seen:
            return scores
        seen = torch.tensor(sorted(i for i in self._seen if 0 <= i < scores.numel()), dtype=torch.long)
        values = scores[seen]
        scores = scores.clone()
        scores[seen] = torch.where(values > 0, values / penalty, values * penalty)
        return scores


def _checked(logits: Tensor) -> Tensor:
    if logits.dim() != 1 or logits.numel() == 0:
        raise EngineError(f"logits must be [vocab_size], got shape {list(logits.shape)}")
    scores = logits.detach().to(device="cpu", dtype=torch.float32)
    peak = float(scores.max())  # max propagates NaN
    if not math.isfinite(peak):
        found = "NaN" if math.isnan(peak) else f"a maximum of {peak}"
        raise EngineError(
            f"the logits hold {found}: the weights or kernels are broken;"
            " run `kttools verify` on the model and `kttools doctor` on the machine"
        )
    return scores


def candidates(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """What may be drawn: (probabilities [n] f32 summing to 1, ids [n] int64), most likely first.

    scores: [vocab_size] f32, finite maximum. Ties at the edge of top-k fall to whichever the sort puts first.
    """
    scaled = scores / params.temperature
    if 0 < params.top_k < scaled.numel():
        top, ids = torch.topk(scaled, params.top_k)
        probabilities = torch.softmax(top, dim=-1)
    else:
        probabilities, ids = _sorted_softmax(scaled, params)
    keep = probabilities.numel()
    if params.top_p < 1.0:
        keep = _nucleus_size(probabilities, params.top_p)
    if params.min_p > 0.0:
        keep = min(keep, int((probabilities >= params.min_p * probabilities[0]).sum()))
    kept = probabilities[: max(keep, 1)]
    return kept / kept.sum(), ids[: max(keep, 1)]


def _nucleus_size(probabilities: Tensor, top_p: float) -> int:
    """Length of the shortest prefix whose mass reaches top_p. probabilities: sorted, most likely first."""
    before = torch.cumsum(probabilities, dim=0) - probabilities
    return int((before < top_p).sum())


def _sorted_softmax(scaled: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Probabilities and ids, most likely first; only the head of the vocabulary if the filters end there."""
    full = torch.softmax(scaled, dim=-1)
    for width in NUCLEUS_WIDTHS:
        if width >= full.numel() or (params.top_p == 1.0 and params.min_p == 0.0):
            break
        probabilities, ids = torch.topk(full, width)
        ends_by_mass = params.top_p < 1.0 and float(probabilities.sum()) >= params.top_p
        if ends_by_mass or float(probabilities[-1]) < params.min_p * float(probabilities[0]):
            return probabilities, ids
    return torch.sort(full, descending=True, stable=True)
