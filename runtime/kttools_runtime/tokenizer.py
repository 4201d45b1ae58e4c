"""The model's own tokenizer and chat template, read from a directory of Hugging Face files.

tokenizer.json (required) is run by the `tokenizers` library; tokenizer_config.json, special_tokens_map.json,
generation_config.json and chat_template.jinja add to it when they are there. Nothing in them is executed
except the chat template, in a sandbox (chat_template.py).
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from . import strict_json
from .chat_template import ChatTemplate
from .errors import InvalidInputError
from .streaming import ByteStepper, Stepper, StreamDecoder, token_bytes
from .tokenizer_limits import TokenizerLimitError, check_tokenizer

MAX_TOKENIZER_BYTES = strict_json.MAX_JSON_BYTES
MAX_CONFIG_BYTES = 16 << 20
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def read_bounded(path: Path, max_bytes: int) -> str:
    """A UTF-8 text file of at most max_bytes. Raises InvalidInputError when it is larger, or not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise InvalidInputError(f"{path}: no such file") from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise InvalidInputError(f"{path}: larger than {max_bytes} bytes, the limit for this kind of file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path}: not UTF-8 at byte {error.start}") from error


def read_json_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a file of at most max_bytes. Raises InvalidInputError on anything else."""
    try:
        parsed = json.loads(read_bounded(path, max_bytes))
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise InvalidInputError(f"{path}: expected a JSON object, got {type(parsed).__name__}")
    return parsed


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _load_backend(path: Path) -> Backend:
    text = read_bounded(path, MAX_TOKENIZER_BYTES)
    try:
        # strict: of a key given twice, we and the library might believe different ones
        check_tokenizer(strict_json.parse(text.encode("utf-8"), str(path)))
    except TokenizerLimitError as error:
        raise InvalidInputError(f"{path}: refused: {error}") from None
    with _panics_refused(f"{path}: not a tokenizer this version can run"):
        backend = Backend.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    return backend


@contextlib.contextmanager
def _panics_refused(what: str) -> Iterator[None]:
    """InvalidInputError for what the library raises: bare Exception, and BaseException for a Rust panic."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)):
            raise
        raise InvalidInputError(f"{what}: {' '.join(str(error).split())}") from error


def _token_text(value: Any, where: str) -> str | None:
    """A special token as the files write it: a string, {"content": string}, or null."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise InvalidInputError(f"{where}: expected a string or null, got {type(value).__name__}")


class _LibraryStepper:
    """Vocabularies that are not byte-level: the library's own incremental decoder."""

    def __init__(self, backend: Backend, skip_special_tokens: bool) -> None:
        self._backend, self._skip = backend, skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._emitted = 0

    def step(self, token_id: int) -> str:
        self._ids.append(token_id)
        piece = self._stream.step(self._backend, token_id) or ""
        self._emitted += len(piece)
        return piece

    def flush(self) -> str:
        rest = self._backend.decode(self._ids, skip_special_tokens=self._skip)[self._emitted :]
        self._emitted += len(rest)
        return rest


class Tokenizer:
    """Text to ids and back, and conversations to prompts.

    directory: holds tokenizer.json and its companions. Raises InvalidInputError naming the file at fault.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._json_path = self.directory / "tokenizer.json"
        if not self._json_path.is_file():
            raise InvalidInputError(
                f"{self._json_path}: no such file; only models that ship a tokenizer.json can be tokenized"
            )
        self._backend = _load_backend(self._json_path)
        self.config = _optional_json(self.directory / "tokenizer_config.json")
        self.generation_config = _optional_json(self.directory / "generation_config.json")
        self.special_tokens = self._read_special_tokens()
        self._prefix, self._suffix = self._affixes()

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        return self.token_to_id(self.special_tokens.get("bos_token"))

    @property
    def eos_token_id(self) -> int | None:
        return self.token_to_id(self.special_tokens.get("eos_token"))

    def token_to_id(self, token: str | None) -> int | None:
        """The id of a token by its text, or None."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text. Raises InvalidInputError on lone surrogates (bytes that were not UTF-8).

        add_special_tokens: what the model expects before and after a plain text (usually BOS): add_bos_token
        and add_eos_token of tokenizer_config.json where given, else tokenizer.json's post-processor.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidInputError(f"the text is not valid Unicode at character {error.start}") from error
        with _panics_refused(f"{self._json_path}: cannot encode this text"):
            ids = list(self._backend.encode(text, add_special_tokens=False).ids)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; incomplete UTF-8 becomes U+FFFD. Raises InvalidInputError on an id out of range."""
        listed = [int(i) for i in ids]
        bad = next((i for i in listed if not 0 <= i < 1 << 31), None)
        if bad is not None:
            raise InvalidInputError(f"token id {bad} is out of range, the vocabulary has {self.vocab_size}")
        with _panics_refused(f"{self._json_path}: cannot decode these ids"):
            return str(self._backend.decode(listed, skip_special_tokens=skip_special_tokens))

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A fresh incremental decoder for one answer."""
        stepper: Stepper
        if self._is_byte_level:
            table = self._bytes_without_special if skip_special_tokens else self._bytes_of
            stepper = ByteStepper(table)
        else:
            stepper = _LibraryStepper(self._backend, skip_special_tokens)
        return StreamDecoder(stepper)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's own template, or None: chat_template.jinja first, then tokenizer_config.json."""
        path = self.directory / "chat_template.jinja"
        if path.is_file():
            return ChatTemplate(read_bounded(path, MAX_CONFIG_BYTES), str(path))
        where = str(self.directory / "tokenizer_config.json")
        source = _choose_template(self.config.get("chat_template"), where)
        return None if source is None else ChatTemplate(source, where)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as prompt text. messages: [{"role": ..., "content": ...}, ...].

        Raises InvalidInputError when the model has no template, or the template fails or refuses.
        """
        if self.chat_template is None:
            raise InvalidInputError(
                f"{self.directory}: the model has no chat template; use --raw for plain text completion"
            )
        tokens = {name: text for name, text in self.special_tokens.items() if text is not None}
        return self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            **{"tools": None, "documents": None, **tokens},
            **variables,
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of the conversation, ready to prefill; the template writes its own special tokens."""
        return self.encode(
            self.render_chat(messages, add_generation_prompt, **variables), add_special_tokens=False
        )

    def _read_special_tokens(self) -> dict[str, str | None]:
        path = self.directory / "special_tokens_map.json"
        merged = {**_optional_json(path), **{k: v for k, v in self.config.items() if v is not None}}
        return {name: _token_text(merged.get(name), f"{self.directory}: {name}") for name in SPECIAL_TOKENS}

    def _affixes(self) -> tuple[list[int], list[int]]:
        """Ids put before and after a plain text."""
        with _panics_refused(f"{self._json_path}: cannot encode text"):
            bare = self._backend.encode("a", add_special_tokens=False).ids
            full = self._backend.encode("a", add_special_tokens=True).ids
        at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
        prefix, suffix = list(full[:at]), list(full[at + len(bare) :])
        prefix = self._with_flag("add_bos_token", self.bos_token_id, prefix)
        return prefix, self._with_flag("add_eos_token", self.eos_token_id, suffix)

    def _with_flag(self, flag: str, token_id: int | None, affix: list[int]) -> list[int]:
        wanted = self.config.get(flag)
        if wanted is None or token_id is None:
            return affix
        if wanted and token_id not in affix:
            return [*affix, token_id]
        return affix if wanted else [i for i in affix if i != token_id]

    @property
    def _is_byte_level(self) -> bool:
        return type(self._backend.decoder).__name__ == "ByteLevel"

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        return {i: token_bytes(token) for token, i in self._backend.get_vocab(with_added_tokens=True).items()}

    @cached_property
    def _bytes_without_special(self) -> dict[int, bytes]:
        special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        return {i: data for i, data in self._bytes_of.items() if i not in special}


def _choose_template(value: Any, where: str) -> str | None:
    """tokenizer_config.json's chat_template: a string, or a list of {"name", "template"} with a default."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(v, dict) for v in value):
        named = {str(v.get("name")): v.get("template") for v in value}
        chosen = named.get("default")
        if isinstance(chosen, str):
            return chosen
        raise InvalidInputError(f"{where}: chat_template has no template named default, only {sorted(named)}")
    raise InvalidInputError(f"{where}: chat_template is {type(value).__name__}, expected a string or a list")
