"""A conversation with a model over one KV cache: only what is new since the last turn is prefilled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kttools_runtime.errors import InvalidInputError, UsageError
from kttools_runtime.generate import FinishReason, generate
from kttools_runtime.heap import give_back_free_memory
from kttools_runtime.sampling import SamplingParams
from kttools_runtime.streaming import Segment, ThinkingMarker
from kttools_runtime.tokenizer import Tokenizer

from .stats import Stats

THINK_OPENING = "<think>\n"
STOPPABLE_TOKENS = 1024  # prefilled between two looks at Ctrl-C
# generation_config.json key -> SamplingParams field: the model authors' defaults, below every option
GENERATION_KEYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How to answer."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None  # None: until the model stops or the cache is full
    chunk_size: int | None = None
    force_think: bool = False
    raw: bool = False  # complete the text as it stands, without the chat template


def sampling_params(
    generation_config: Mapping[str, Any], where: str, **options: float | int | None
) -> SamplingParams:
    """SamplingParams from options (None: not given) over the model's generation_config.json over greedy.

    The file's values hold only when it says do_sample. Raises InvalidInputError when they make no sense.
    """
    own: dict[str, Any] = {}
    if generation_config.get("do_sample") is True:
        own = {
            f: generation_config[k]
            for k, f in GENERATION_KEYS.items()
            if generation_config.get(k) is not None
        }
        own = {"temperature": 1.0, **own}
    for name, value in own.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise InvalidInputError(f"{where}: {name} must be a number, got {value!r}")
    try:
        defaults = SamplingParams(**own)
    except UsageError as error:
        raise InvalidInputError(f"{where}: {error}") from error
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return replace(defaults, **given)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading ids that are equal."""
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


class ChatSession:
    """One conversation. Not for several threads.

    model: as generate() needs it; cache_len: tokens of prompt and answers, None: the model's default.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, cache_len: int | None, options: ChatOptions) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.cache = model.new_cache(cache_len)
        self.system: str | None = None
        self.messages: list[dict[str, str]] = []
        self.stats: Stats | None = None
        self._cached: list[int] = []  # ids whose keys and values the cache holds
        self._stop_ids = self._all_stop_ids()

    def ask(self, text: str, should_stop: Callable[[], bool] | None = None) -> Iterator[Segment]:
        """The answer to text, in pieces; question and answer join the conversation.

        Raises InvalidInputError for an empty text or one that does not fit; nothing has changed then.
        """
        if not text.strip():
            raise InvalidInputError("the prompt is empty")
        if self.options.raw:
            yield from self._answer(self.tokenizer.encode(text), False, should_stop, [])
            return
        question = {"role": "user", "content": text}
        ids, is_thinking = self._prompt([*self.messages, question])
        answer: list[str] = []
        self._check_fit(ids)
        self.messages.append(question)
        try:
            yield from self._answer(ids, is_thinking, should_stop, answer)
        finally:
            self.messages.append({"role": "assistant", "content": "".join(answer)})

    def regenerate(self, should_stop: Callable[[], bool] | None = None) -> Iterator[Segment]:
        """Answers the last question again. Raises UsageError when there is none."""
        if len(self.messages) < 2:
            raise UsageError("there is no answer to make again")
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        yield from self.ask(question, should_stop)

    def clear(self) -> None:
        """Forgets the conversation; the system message stays."""
        self.messages.clear()

    def _answer(
        self,
        ids: list[int],
        is_thinking: bool,
        should_stop: Callable[[], bool] | None,
        answer: list[str],
    ) -> Iterator[Segment]:
        """Streams the answer to a tokenised prompt and collects its text; keeps the record of the cache."""
        self._check_fit(ids)
        reused = self._rewind(ids)
        self.stats = stats = Stats(prompt_tokens=len(ids), cached_tokens=reused)
        decoder, marker = self.tokenizer.stream_decoder(), ThinkingMarker(is_thinking)
        produced: list[int] = []
        if is_thinking:
            answer.append(THINK_OPENING)
            yield Segment(THINK_OPENING, True)
        try:
            for token_id in self._tokens(ids, reused, should_stop, stats):
                produced.append(token_id)
                yield from self._collect(marker.push(decoder.push(token_id)), answer)
            yield from self._collect([*marker.push(decoder.flush()), *marker.flush()], answer)
        finally:
            self._cached = [*ids, *produced][: self.cache.length]
            give_back_free_memory()

    def _tokens(
        self, ids: list[int], reused: int, should_stop: Callable[[], bool] | None, stats: Stats
    ) -> Iterator[int]:
        limit = self.options.max_new_tokens
        stream = generate(
            self.model,
            ids[reused:],
            self.cache.capacity if limit is None else limit,
            self.options.sampling,
            stop_ids=self._stop_ids,
            cache=self.cache,
            chunk_size=self.options.chunk_size or STOPPABLE_TOKENS,
            history=ids[:reused],
            should_stop=should_stop,
        )
        reason = FinishReason.INTERRUPTED
        try:
            while True:
                try:
                    token_id = next(stream)
                except StopIteration as end:
                    reason = end.value
                    return
                stats.count_token()
                yield token_id
        finally:
            stats.finish(reason.value)

    @staticmethod
    def _collect(segments: list[Segment], answer: list[str]) -> Iterator[Segment]:
        for segment in segments:
            answer.append(segment.text)
            yield segment

    def _rewind(self, ids: list[int]) -> int:
        """Cuts the cache back to what it shares with ids (at least one id is left to prefill)."""
        shared = min(common_prefix(self._cached, ids), len(ids) - 1)
        self.cache.truncate(shared)
        del self._cached[shared:]
        return shared

    def _prompt(self, messages: list[dict[str, str]]) -> tuple[list[int], bool]:
        """Ids of the conversation, and whether the prompt leaves a thinking tag open."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        text = self.tokenizer.render_chat([*system, *messages])
        if self.options.force_think and not text.rstrip().endswith(ThinkingMarker.OPEN):
            text += THINK_OPENING
        is_open = text.rstrip().endswith(ThinkingMarker.OPEN)
        return self.tokenizer.encode(text, add_special_tokens=False), is_open

    def _check_fit(self, ids: list[int]) -> None:
        if len(ids) > self.cache.capacity:
            raise InvalidInputError(
                f"the prompt has {len(ids)} tokens, the cache holds {self.cache.capacity}:"
                " shorten it, start afresh, or raise --cache_lens"
            )

    def _all_stop_ids(self) -> frozenset[int]:
        """The model's eos ids, those of its generation_config.json, and the tokenizer's own."""
        more = self.tokenizer.generation_config.get("eos_token_id")
        extra = more if isinstance(more, list) else [more]
        own = [*self.model.config.eos_token_ids, self.tokenizer.eos_token_id, *extra]
        return frozenset(i for i in own if isinstance(i, int))
