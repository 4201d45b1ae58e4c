"""The generation loop over a model whose next token is known."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kttools_runtime.errors import EngineError, InvalidInputError, UsageError
from kttools_runtime.generate import FinishReason, generate
from kttools_runtime.sampling import SamplingParams

VOCAB, EOS = 50, 9


@dataclass
class FakeCache:
    capacity: int
    length: int = 0
    ids: list[int] = field(default_factory=list)


@dataclass
class Counter:
    """After token n comes n + 1: the answer to [.., 3] is 4, 5, 6, ... and EOS is 9."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    capacities: list[int] = field(default_factory=list)
    config = SimpleNamespace(eos_token_ids=(EOS,), vocab_size=VOCAB)

    def new_cache(self, cache_len: int) -> FakeCache:
        self.capacities.append(cache_len)
        return FakeCache(cache_len)

    def prefill(self, token_ids: Sequence[int], cache: FakeCache, chunk_size: int | None = None) -> Tensor:
        self.calls.append(("prefill", len(token_ids)))
        return self._step(token_ids, cache)

    def decode(self, token_id: int, cache: FakeCache) -> Tensor:
        self.calls.append(("decode", token_id))
        return self._step([token_id], cache)

    @staticmethod
    def _step(ids: Sequence[int], cache: FakeCache) -> Tensor:
        assert cache.length + len(ids) <= cache.capacity, "the loop overfilled the cache"
        cache.ids.extend(ids)
        cache.length += len(ids)
        logits = torch.zeros(VOCAB)
        logits[(ids[-1] + 1) % VOCAB] = 5.0
        return logits


def run(model: Counter, ids: Sequence[int], n: int, **options: object) -> tuple[list[int], FinishReason]:
    produced: list[int] = []
    stream = generate(model, ids, n, **options)  # type: ignore[arg-type]
    while True:
        try:
            produced.append(next(stream))
        except StopIteration as end:
            return produced, end.value


def test_counts_to_the_limit() -> None:
    model = Counter()
    assert run(model, [20, 21], 3) == ([22, 23, 24], FinishReason.LENGTH)
    assert model.calls == [("prefill", 2), ("decode", 22), ("decode", 23)], "the last token needs no decode"
    assert model.capacities == [4], "prompt and all but the last token"


def test_stops_at_eos_without_yielding_it() -> None:
    assert run(Counter(), [5], 100) == ([6, 7, 8], FinishReason.STOP)


def test_other_stop_ids() -> None:
    assert run(Counter(), [5], 5, stop_ids={7}) == ([6], FinishReason.STOP)
    assert run(Counter(), [5], 6, stop_ids=()) == ([6, 7, 8, 9, 10, 11], FinishReason.LENGTH)


def test_stops_when_the_cache_is_full() -> None:
    cache = FakeCache(4)
    assert run(Counter(), [20, 21], 99, cache=cache) == ([22, 23, 24], FinishReason.CACHE_FULL)
    assert cache.ids == [20, 21, 22, 23]


def test_a_prompt_that_fills_the_cache_still_gets_one_token() -> None:
    assert run(Counter(), [20, 21], 9, cache=FakeCache(2)) == ([22], FinishReason.CACHE_FULL)


def test_goes_on_after_what_the_cache_holds() -> None:
    cache = FakeCache(8, length=2, ids=[20, 21])
    assert run(Counter(), [30], 2, cache=cache) == ([31, 32], FinishReason.LENGTH)
    assert cache.ids == [20, 21, 30, 31]


def test_zero_tokens_only_prefills() -> None:
    model = Counter()
    assert run(model, [1, 2], 0) == ([], FinishReason.LENGTH)
    assert model.calls == [("prefill", 2)]


@pytest.mark.parametrize(("chunk_size", "chunks"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_prefills_in_chunks(chunk_size: int, chunks: list[int]) -> None:
    model = Counter()
    assert run(model, [1, 2, 3, 20, 21], 1, chunk_size=chunk_size)[0] == [22]
    assert model.calls == [("prefill", n) for n in chunks]


def test_should_stop_between_tokens() -> None:
    answers = iter([False, False, True])
    produced, reason = run(Counter(), [20], 50, should_stop=lambda: next(answers))
    assert (produced, reason) == ([21, 22], FinishReason.INTERRUPTED)


def test_should_stop_between_prefill_chunks() -> None:
    answers, cache = iter([False, True]), FakeCache(9)
    stream = run(Counter(), [1, 2, 3], 5, cache=cache, chunk_size=2, should_stop=lambda: next(answers))
    assert stream == ([], FinishReason.INTERRUPTED)
    assert cache.ids == [1, 2]


def test_history_counts_for_the_repetition_penalty() -> None:
    params = SamplingParams(repetition_penalty=100.0)
    produced, _ = run(Counter(), [20], 1, params=params, history=[21])
    # 5.0 / 100 is still above the zeros; a larger logit elsewhere would win
    assert produced == [21]
    tilted = Counter()
    tilted._step = lambda ids, cache: torch.tensor([0.0, 5.0, 1.0])  # type: ignore[method-assign]
    assert run(tilted, [20], 1, params=params, history=[1])[0] == [2]
    assert run(tilted, [20], 1, params=params)[0] == [1]


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([], {}, InvalidInputError, "the prompt is empty"),
        ([1, 2, 3], {"cache": FakeCache(2)}, InvalidInputError, "the prompt has 3 tokens, the cache holds 2"),
        ([1], {"cache": FakeCache(2, length=2)}, InvalidInputError, "on top of 2 in the cache"),
        ([50], {}, InvalidInputError, "token id 50, the model's vocabulary has 50"),
        ([-1], {}, InvalidInputError, "token id -1"),
        ([1], {"max_new_tokens": -1}, UsageError, "max_new_tokens must not be negative"),
        ([1], {"chunk_size": 0}, UsageError, "chunk_size must be positive"),
    ],
)
def test_refusals(ids, options, error, message) -> None:
    with pytest.raises(error, match=message):
        run(Counter(), ids, options.pop("max_new_tokens", 4), **options)


def test_nan_is_an_engine_error() -> None:
    model = Counter()
    model._step = lambda ids, cache: torch.full((VOCAB,), float("nan"))  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="NaN"):
        run(model, [1], 3)
