"""The generation loop: prefill the prompt, then one token at a time until something ends it."""

import enum
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, Protocol

from torch import Tensor

from .errors import InvalidInputError, UsageError
from .sampling import Sampler, SamplingParams


class FinishReason(str, enum.Enum):
    """Why an answer ended; the return value of the generator."""

    STOP = "stop"  # a stop id was drawn (it is not yielded)
    LENGTH = "length"  # max_new_tokens reached
    CACHE_FULL = "cache_full"  # no room for another token
    INTERRUPTED = "interrupted"  # should_stop said so


class Cache(Protocol):
    """What the loop reads of a KV cache."""

    @property
    def length(self) -> int: ...
    @property
    def capacity(self) -> int: ...


class Model(Protocol):
    """What the loop needs of a model; kttools_runtime.model.Model is one."""

    @property
    def config(self) -> Any: ...
    def new_cache(self, cache_len: int | None = None) -> Any: ...
    def prefill(self, token_ids: Sequence[int], cache: Any, chunk_size: int | None = None) -> Tensor: ...
    def decode(self, token_id: int, cache: Any) -> Tensor: ...


def generate(
    model: Model,
    token_ids: Sequence[int],
    max_new_tokens: int,
    params: SamplingParams | None = None,
    *,
    stop_ids: Collection[int] | None = None,
    cache: Any = None,
    chunk_size: int | None = None,
    history: Sequence[int] = (),
    should_stop: Callable[[], bool] | None = None,
) -> Generator[int, None, FinishReason]:
    """Yields the ids of the answer; the generator's return value is its FinishReason.

    token_ids: the prompt, or with a cache that already holds tokens what follows them. Every yielded id but
    the last is then in the cache. max_new_tokens: 0 prefills only. stop_ids: default the model's eos ids.
    cache: default a new one of just the needed length. chunk_size: tokens per prefill step. history: ids
    before token_ids that the repetition penalty counts. should_stop: asked between prefill chunks and tokens.
    Raises InvalidInputError at the first step for an empty prompt or one that does not fit, UsageError for
    numbers that make no sense.
    """
    _check_numbers(max_new_tokens, chunk_size)
    prompt = _checked_prompt(token_ids, int(model.config.vocab_size))
    if cache is None:
        cache = model.new_cache(len(prompt) + max(max_new_tokens - 1, 0))
    _check_fit(len(prompt), cache)
    stops = frozenset(model.config.eos_token_ids if stop_ids is None else stop_ids)
    asked = should_stop or _never
    sampler = Sampler(params or SamplingParams(), [*history, *prompt])
    logits = _prefill(model, prompt, cache, chunk_size, asked)
    if logits is None:
        return FinishReason.INTERRUPTED
    for produced in range(1, max_new_tokens + 1):
        token_id = sampler.sample(logits)
        if token_id in stops:
            return FinishReason.STOP
        yield token_id
        if asked():
            return FinishReason.INTERRUPTED
        if produced == max_new_tokens:
            break
        if cache.length >= cache.capacity:
            return FinishReason.CACHE_FULL
        logits = model.decode(token_id, cache)
    return FinishReason.LENGTH


def _prefill(
    model: Model, prompt: list[int], cache: Any, chunk_size: int | None, should_stop: Callable[[], bool]
) -> Tensor | None:
    """Logits [vocab_size] after the prompt, or None when stopped between chunks (the cache stays whole)."""
    step = chunk_size or len(prompt)
    logits = None
    for start in range(0, len(prompt), step):
        if should_stop():
            return None
        logits = model.prefill(prompt[start : start + step], cache, chunk_size=chunk_size)
    return logits


def _never() -> bool:
    return False


def _check_numbers(max_new_tokens: int, chunk_size: int | None) -> None:
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if chunk_size is not None and chunk_size < 1:
        raise UsageError(f"chunk_size must be positive, got {chunk_size}")


def _checked_prompt(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    prompt = [int(i) for i in token_ids]
    if not prompt:
        raise InvalidInputError("the prompt is empty: give at least one token")
    bad = next((i for i in prompt if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise InvalidInputError(f"the prompt holds token id {bad}, the model's vocabulary has {vocab_size}")
    return prompt


def _check_fit(prompt_tokens: int, cache: Any) -> None:
    if cache.length + prompt_tokens > cache.capacity:
        held = f" on top of {cache.length} in the cache" if cache.length else ""
        raise InvalidInputError(
            f"the prompt has {prompt_tokens} tokens{held}, the cache holds {cache.capacity}:"
            " shorten the prompt or raise --cache_lens"
        )
