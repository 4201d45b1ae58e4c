"""The conversation over a scripted model: what is prefilled, what is remembered, what is marked."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kttools.chat.session import ChatOptions, ChatSession, common_prefix, sampling_params
from kttools.chat.stats import Stats
from kttools_runtime.cache import KVCache
from kttools_runtime.errors import InvalidInputError, UsageError
from kttools_runtime.sampling import SamplingParams
from kttools_runtime.tokenizer import Tokenizer


class Cache:
    """The ids themselves, so that a test can see what the model would attend to."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.ids = capacity, []

    @property
    def length(self) -> int:
        return len(self.ids)

    def truncate(self, length: int) -> None:
        assert 0 <= length <= len(self.ids)
        del self.ids[length:]


class Scripted:
    """Answers with the given texts, one per prompt, token by token, then eos."""

    def __init__(self, tokenizer: Tokenizer, *answers: str) -> None:
        self.tokenizer, self.prefilled = tokenizer, []
        eos = tokenizer.eos_token_id
        assert eos is not None
        self.config = SimpleNamespace(vocab_size=tokenizer.vocab_size, eos_token_ids=(eos,))
        self.answers = [[*tokenizer.encode(a, add_special_tokens=False), eos] for a in answers]
        self.current: list[int] = []

    def new_cache(self, cache_len: int | None = None) -> Cache:
        return Cache(cache_len or 1000)

    def prefill(self, token_ids: Sequence[int], cache: Cache, chunk_size: int | None = None) -> Tensor:
        self.prefilled.append(len(token_ids))
        cache.ids.extend(token_ids)
        self.current = list(self.answers[0])
        return self._next()

    def decode(self, token_id: int, cache: Cache) -> Tensor:
        cache.ids.append(token_id)
        return self._next()

    def _next(self) -> Tensor:
        logits = torch.zeros(self.config.vocab_size)
        logits[self.current.pop(0)] = 9.0
        if not self.current:
            del self.answers[0]
        return logits


@pytest.fixture(scope="module")
def tokenizer(nano_checkpoint: Path) -> Tokenizer:
    return Tokenizer(nano_checkpoint)


def session(tokenizer: Tokenizer, *answers: str, cache_len: int = 1000, **options: object) -> ChatSession:
    return ChatSession(Scripted(tokenizer, *answers), tokenizer, cache_len, ChatOptions(**options))  # type: ignore[arg-type]


def text_of(segments) -> str:
    return "".join(s.text for s in segments)


def test_the_scripted_cache_is_like_the_real_one() -> None:
    for name in ("capacity", "length", "truncate"):
        assert hasattr(KVCache, name)


def test_an_answer_and_its_statistics(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, "An answer \U0001f600.")
    assert text_of(chat.ask("What?")) == "An answer \U0001f600."
    assert chat.messages[-1] == {"role": "assistant", "content": "An answer \U0001f600."}
    assert chat.stats is not None
    assert chat.stats.finish_reason == "stop"
    assert chat.stats.prompt_tokens == len(tokenizer.apply_chat_template(chat.messages[:1]))
    assert chat.stats.generated_tokens == len(tokenizer.encode("An answer \U0001f600.", False))


def test_the_second_turn_prefills_only_what_is_new(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, "One.", "Two.")
    first = text_of(chat.ask("First question?"))
    held = chat.cache.length
    assert text_of(chat.ask("And then?")) == "Two."
    ids = tokenizer.apply_chat_template(chat.messages[:3])
    assert chat.stats is not None
    assert chat.stats.prompt_tokens == len(ids)
    assert chat.stats.cached_tokens >= held - 1  # the answer may tokenise differently at its end
    assert chat.model.prefilled[1] == len(ids) - chat.stats.cached_tokens
    assert chat.cache.ids[: len(ids)] == ids, "the cache holds exactly the conversation"
    assert first == "One."


def test_regenerate_reuses_the_whole_prompt(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, "One.", "Other.")
    list(chat.ask("Question?"))
    assert text_of(chat.regenerate()) == "Other."
    assert chat.model.prefilled[1] == 1, "one token must be prefilled to get logits"
    assert [m["content"] for m in chat.messages] == ["Question?", "Other."]
    with pytest.raises(UsageError, match="no answer to make again"):
        list(session(tokenizer).regenerate())


def test_clear_keeps_the_system_message(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, "One.", "Two.")
    chat.system = "Be brief."
    list(chat.ask("Question?"))
    chat.clear()
    list(chat.ask("Again?"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Again?"}]
    ids = tokenizer.apply_chat_template(messages)
    assert chat.cache.ids[: len(ids)] == ids


def test_stopped_answers_stay_in_the_conversation(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, "one two three four five six", "Next.")
    count = iter(range(100))
    answer = text_of(chat.ask("Count.", should_stop=lambda: next(count) >= 3))
    assert answer
    assert "one two three four five six".startswith(answer)
    assert chat.stats is not None
    assert chat.stats.finish_reason == "interrupted"
    assert chat.messages[-1]["content"] == answer
    chat.model.answers.pop(0)
    assert text_of(chat.ask("Go on.")) == "Next."
    ids = tokenizer.apply_chat_template(chat.messages[:3])
    assert chat.cache.ids[: len(ids)] == ids


def test_a_consumer_that_leaves_early_harms_nothing(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, "one two three", "Next.")
    stream = chat.ask("Count.")
    next(stream)
    stream.close()
    chat.model.answers.pop(0)
    assert text_of(chat.ask("Go on.")) == "Next."
    ids = tokenizer.apply_chat_template(chat.messages[:3])
    assert chat.cache.ids[: len(ids)] == ids


def test_thinking_is_marked(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, "<think>hm</think>Yes.")
    segments = list(chat.ask("Really?"))
    assert text_of(s for s in segments if s.is_thinking) == "<think>hm</think>"
    assert text_of(s for s in segments if not s.is_thinking) == "Yes."


def test_force_think_opens_the_tag(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, "hm</think>Yes.", force_think=True)
    segments = list(chat.ask("Really?"))
    assert text_of(s for s in segments if s.is_thinking) == "<think>\nhm</think>"
    assert chat.messages[-1]["content"] == "<think>\nhm</think>Yes."
    assert "<think>" in tokenizer.decode(chat.cache.ids)


def test_raw_is_plain_completion(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, " there was", raw=True)
    assert text_of(chat.ask("Once upon a time")) == " there was"
    assert chat.messages == []
    assert chat.cache.ids[: len(tokenizer.encode("Once upon a time"))] == tokenizer.encode("Once upon a time")


def test_limits(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, "one two three four", max_new_tokens=2)
    list(chat.ask("Count."))
    assert chat.stats is not None
    assert (chat.stats.generated_tokens, chat.stats.finish_reason) == (2, "length")
    small = session(tokenizer, "one two three four five", cache_len=8)
    list(small.ask("Hi"))
    assert small.stats is not None
    assert small.stats.finish_reason == "cache_full"


def test_refusals_leave_the_conversation_alone(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, "One.", cache_len=12)
    for text, message in (("  \n", "the prompt is empty"), ("word " * 50, "the cache holds 12")):
        with pytest.raises(InvalidInputError, match=message):
            list(chat.ask(text))
    assert chat.messages == []
    assert text_of(chat.ask("Hi?")) == "One."


def test_long_prompts_are_prefilled_in_stoppable_steps(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, "One.", cache_len=9000)
    list(chat.ask("word " * 3000))
    assert len(chat.model.prefilled) > 1
    assert max(chat.model.prefilled) <= 1024


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2


def test_sampling_defaults_come_from_the_model() -> None:
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "bos_token_id": 0}
    assert sampling_params(own, "g.json") == SamplingParams(temperature=0.6, top_p=0.95)
    assert sampling_params(own, "g.json", temperature=0.0, seed=3) == SamplingParams(top_p=0.95, seed=3)
    assert sampling_params({"do_sample": True}, "g.json").temperature == 1.0
    assert sampling_params({"temperature": 0.6}, "g.json") == SamplingParams(), "do_sample is off: greedy"


@pytest.mark.parametrize(
    ("value", "message"), [("hot", "temperature must be a number"), (-1, "temperature must be in")]
)
def test_sampling_defaults_that_make_no_sense(value: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"g\.json: {message}"):
        sampling_params({"do_sample": True, "temperature": value}, "g.json")
    with pytest.raises(UsageError):
        sampling_params({}, "g.json", temperature=-1.0)


def test_rates() -> None:
    stats = Stats(prompt_tokens=30, cached_tokens=10, generated_tokens=5, started=1.0)
    stats.first_token, stats.last_token = 3.0, 5.0
    assert stats.prompt_tokens_per_s == 10.0
    assert stats.generation_tokens_per_s == 2.0
    assert stats.line(0.5) == (
        "prompt 30 tokens (10 from cache), 10.00 tok/s; generation 5 tokens, 2.00 tok/s;"
        " load 0.50 s; time to first token 2.000 s"
    )
    assert Stats(prompt_tokens=1).generation_tokens_per_s == 0.0
