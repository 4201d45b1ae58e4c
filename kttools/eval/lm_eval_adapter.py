"""A model of this runtime as a model of lm-evaluation-harness (optional extra: kttools[lm-eval]).

    from kttools.eval.lm_eval_adapter import KTToolsLM
    lm_eval.simple_evaluate(model=KTToolsLM(model="BUNDLE", expert_table="FILE"), tasks=["hellaswag"])

What is measured is the live runtime: its quantised experts, and the expert table it serves with. Interface:
lm_eval.api.model.LM of lm-evaluation-harness 0.4.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import kttools_runtime as kt
from kttools_runtime.errors import InvalidInputError, UsageError

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise UsageError(
        f"lm-evaluation-harness cannot be imported ({error}); pip install 'kttools[lm-eval]'"
    ) from error

DEFAULT_MAX_LENGTH = 2048
DEFAULT_MAX_GEN_TOKS = 256
# Generation options that this adapter honours; any other changes results and is refused.
GENERATION_KEYS = {"until", "max_gen_toks", "temperature", "top_p", "top_k", "min_p", "do_sample", "seed"}


class KTToolsLM(LM):
    """model: a bundle, or a loaded kttools_runtime.Model. max_length: tokens of context and continuation.

    expert_table, num_experts, dtype, threads: as in kttools_runtime.load.
    """

    def __init__(
        self,
        model: str | kt.Model,
        max_length: int = DEFAULT_MAX_LENGTH,
        max_gen_toks: int = DEFAULT_MAX_GEN_TOKS,
        **load_options: Any,
    ) -> None:
        super().__init__()
        ignored = {"batch_size", "max_batch_size"}  # the harness passes them to every model
        options = {k: v for k, v in load_options.items() if k not in ignored and v is not None}
        self._model = kt.load(model, **options) if isinstance(model, str) else model
        self.max_length = min(int(max_length), self._model.config.max_position_embeddings)
        self.max_gen_toks = int(max_gen_toks)
        self._tokenizer = self._model.tokenizer

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is conditioned on: BOS, or EOS for models without one."""
        first = self._tokenizer.bos_token_id
        token = self._tokenizer.eos_token_id if first is None else first
        if token is None:
            raise InvalidInputError("the tokenizer has neither a BOS nor an EOS token to start a text with")
        return token

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.directory.name

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Named in the harness's results; the model's own template is the only one there is."""
        return "model" if self._tokenizer.chat_template else ""

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        return self._tokenizer.render_chat(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For (context, continuation): the continuation's log probability, and whether it is greedy."""
        out = []
        for request in requests:
            context, continuation = self._encode_pair(*request.args)
            out.append(self._score(context, continuation))
            self.cache_hook.add_partial("loglikelihood", request.args, out[-1])
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For (text,): its log probability; every token predicted once, with as much context as fits."""
        out = []
        for request in requests:
            tokens = self._tokenizer.encode(request.args[0], add_special_tokens=False)
            pieces = rolling_windows(tokens, self.prefix_token_id, self.max_length)
            out.append(sum(self._score(context, piece)[0] for context, piece in pieces))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, out[-1])
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For (context, options): text up to the first stop string. Greedy unless the options sample."""
        out = []
        for request in requests:
            context, options = request.args
            out.append(self._generate(context, options))
            self.cache_hook.add_partial("generate_until", request.args, out[-1])
        return out

    def _encode(self, text: str) -> list[int]:
        """Ids of a text; BOS once, also where a chat template has already written it."""
        bos = self._tokenizer.special_tokens.get("bos_token")
        return self._tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, split so that together they are the ids of the joined text.

        Spaces at the end of the context go to the continuation, where tokenizers attach them.
        """
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        if not context:
            return [self.prefix_token_id], self._tokenizer.encode(continuation, add_special_tokens=False)
        ids = self._encode(context)
        return ids, self._encode(context + continuation)[len(ids) :]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        if len(continuation) >= self.max_length:
            raise InvalidInputError(
                f"a continuation of {len(continuation)} tokens does not fit in max_length {self.max_length}"
            )
        ids = (context + continuation)[-self.max_length :]
        rows = self._model.logits(ids[:-1])[-len(continuation) :].double().cpu()
        targets = torch.tensor(continuation)
        chosen = torch.log_softmax(rows, dim=-1).gather(1, targets[:, None])
        return float(chosen.sum()), bool((rows.argmax(dim=-1) == targets).all())

    def _generate(self, context: str, options: Mapping[str, Any]) -> str:
        unknown = set(options) - GENERATION_KEYS
        if unknown:
            raise UsageError(f"generation options that are not supported: {', '.join(sorted(unknown))}")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = int(options.get("max_gen_toks", self.max_gen_toks))
        ids = self._encode(context)[-(self.max_length - limit) :] if limit < self.max_length else []
        if not ids:
            raise InvalidInputError(f"max_gen_toks {limit} leaves no room in max_length {self.max_length}")
        tokens = self._model.generate(ids, limit, **_sampling(options))
        decoder, text = self._tokenizer.stream_decoder(), ""
        for token in tokens:
            text += decoder.push(token)
            if any(stop in text for stop in stops):
                break
        else:
            text += decoder.flush()
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """SamplingParams of the runtime; do_sample false means greedy whatever the temperature says."""
    found = {k: options[k] for k in ("top_p", "top_k", "min_p", "seed") if options.get(k) is not None}
    temperature = float(options.get("temperature") or 0.0)
    return found | {"temperature": temperature if options.get("do_sample", temperature > 0) else 0.0}


def rolling_windows(
    tokens: list[int], prefix_token_id: int, max_length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(context, tokens to predict): disjoint pieces; later ones see as much before them as fits."""
    step = max_length - 1
    for start in range(0, len(tokens), step):
        piece = tokens[start : start + step]
        before = [prefix_token_id, *tokens[:start]] if start == 0 else tokens[:start]
        yield before[-(max_length - len(piece)) :], piece
