"""The adapter against plain logits, under the real harness's base class or a stub with the same methods."""

import abc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import kttools_runtime as kt
from kttools_runtime.errors import InvalidInputError, UsageError

MODULE = "kttools.eval.lm_eval_adapter"


class StubLM(abc.ABC):
    """The abstract methods of lm_eval.api.model.LM (0.4) and the attribute its subclasses use."""

    def __init__(self) -> None:
        self.cache_hook = SimpleNamespace(add_partial=lambda *args: None)

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...
    @abc.abstractmethod
    def loglikelihood_rolling(self, requests: Any) -> Any: ...
    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...


@pytest.fixture(scope="module")
def adapter() -> Iterator[Any]:
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError:
        names = ("lm_eval", "lm_eval.api", "lm_eval.api.model")
        stubs = {name: ModuleType(name) for name in names}
        stubs["lm_eval.api.model"].LM = StubLM  # type: ignore[attr-defined]
        sys.modules.update(stubs)
        yield importlib.import_module(MODULE)
        for name in (*names, MODULE):
            sys.modules.pop(name, None)
    else:
        yield importlib.import_module(MODULE)


@pytest.fixture(scope="module")
def model(nano_bundle_bf16: Path) -> kt.Model:
    return kt.load(nano_bundle_bf16, dtype="float32", threads=1)


@pytest.fixture(scope="module")
def lm(adapter: Any, model: kt.Model) -> Any:
    return adapter.KTToolsLM(model)


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_loglikelihood_is_the_sum_of_log_probabilities(lm: Any, model: kt.Model) -> None:
    context, continuation = "A mixture-of-experts model keeps", " many small networks"
    whole = model.tokenizer.encode(context + continuation)
    start = len(model.tokenizer.encode(context))
    log_p = torch.log_softmax(model.logits(whole).double(), dim=-1)
    expected = sum(float(log_p[i - 1, whole[i]]) for i in range(start, len(whole)))
    ((found, is_greedy),) = lm.loglikelihood([request(context, continuation)])
    assert found == pytest.approx(expected, rel=1e-5)
    greedy = all(int(log_p[i - 1].argmax()) == whole[i] for i in range(start, len(whole)))
    assert is_greedy == greedy
    # A space at the end of the context belongs to the continuation.
    ((moved, _),) = lm.loglikelihood([request(context + " ", continuation[1:])])
    assert moved == found


def test_an_empty_context_is_the_beginning_of_a_text(lm: Any, model: kt.Model) -> None:
    ((found, _),) = lm.loglikelihood([request("", "The")])
    assert lm.loglikelihood_rolling([request("The")]) == [pytest.approx(found, rel=1e-6)]


def test_rolling_windows_predict_every_token_once(adapter: Any) -> None:
    tokens = list(range(10, 21))
    windows = list(adapter.rolling_windows(tokens, 1, 5))
    assert [token for _, piece in windows for token in piece] == tokens
    assert all(len(context) > 0 and len(context) + len(piece) <= 5 for context, piece in windows)
    assert windows[0] == ([1], [10, 11, 12, 13])
    assert windows[-1] == ([16, 17], [18, 19, 20])


def test_generation_stops_at_the_first_stop_string(lm: Any, model: kt.Model) -> None:
    prompt = model.tokenizer.render_chat([{"role": "user", "content": "What is a mixture-of-experts model?"}])
    (whole,) = lm.generate_until([request(prompt, {"max_gen_toks": 48})])
    assert "experts" in whole
    (cut,) = lm.generate_until([request(prompt, {"until": ["experts", "zzz"], "max_gen_toks": 48})])
    assert cut == whole[: whole.index("experts")]
    assert lm._encode(prompt).count(model.tokenizer.bos_token_id) == 1


def test_options_that_would_be_ignored_are_refused(lm: Any) -> None:
    with pytest.raises(UsageError, match="not supported: num_beams"):
        lm.generate_until([request("a", {"num_beams": 4})])
    with pytest.raises(InvalidInputError, match="leaves no room"):
        lm.generate_until([request("a", {"max_gen_toks": 4096})])
    with pytest.raises(InvalidInputError, match="does not fit in max_length"):
        lm.loglikelihood([request("a", " word" * 3000)])


def test_without_the_harness_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(UsageError, match=r"pip install 'kttools\[lm-eval\]'"):
        importlib.import_module(MODULE)
