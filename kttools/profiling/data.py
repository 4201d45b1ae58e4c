"""Documents for profiling: the rows of a data set, tokenized as the model sees them, with their provenance.

Order is the files' (sorted by name) and the rows'; nothing is shuffled, so that the same spec gives the same
documents on every machine, and a shard is a choice of documents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kttools_runtime.errors import InvalidInputError

from .data_rows import Row, provenance_of, read_rows
from .data_spec import DataSpec, parse_spec

__all__ = ["DataSpec", "Document", "documents", "parse_spec", "provenance"]

# A document predicts all its tokens but the first: one token alone measures nothing.
MIN_TOKENS = 2


class TokenizerLike(Protocol):
    """The part of kttools_runtime.tokenizer.Tokenizer that is used here."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def apply_chat_template(
        self, messages: Sequence[Any], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Document:
    """One document. id: `<file name or hub id>:<row>`, unique inside its domain. token_ids: at least two."""

    domain: str
    id: str
    token_ids: list[int]


def documents(
    spec: DataSpec | str, tokenizer: TokenizerLike, max_tokens: int | None = None
) -> Iterator[Document]:
    """The documents of a domain, in order; the one that crosses max_tokens is cut to fit.

    Raises InvalidInputError: no such file, no such field, an empty document, text that cannot be decoded, no
    documents at all. DownloadError: a hub data set that cannot be had.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    left, count = max_tokens, 0
    for row in read_rows(spec):
        if left is not None and left < MIN_TOKENS:
            return
        # An empty row of somebody else's data set is not the user's to mend; one in a file of theirs is.
        if spec.is_hub and _is_empty(row.value):
            continue
        tokens = _tokens(spec, row, tokenizer)[:left]
        count += 1
        if left is not None:
            left -= len(tokens)
        yield Document(spec.domain, row.id, tokens)
    if not count:
        raise InvalidInputError(f"{spec.text}: no documents in it")


def provenance(spec: DataSpec | str) -> dict[str, Any]:
    """Where a domain's text comes from: files with size, sha256 and rows, or hub id and revision."""
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    return provenance_of(spec)


def _tokens(spec: DataSpec, row: Row, tokenizer: TokenizerLike) -> list[int]:
    where, value = f"{row.where}: row {row.index}", row.value
    if value is None:
        raise InvalidInputError(f"{where} has no field {spec.field!r}; name the field with #FIELD")
    if not isinstance(value, str | list):
        kind = type(value).__name__
        raise InvalidInputError(f"{where}: field {spec.field!r} is {kind}, expected text or chat messages")
    if _is_empty(value):
        raise InvalidInputError(f"{where} is empty in field {spec.field!r}; remove it")
    try:
        tokens = _encode(value, tokenizer)
    except InvalidInputError as error:
        raise InvalidInputError(f"{where}: {error}") from None
    if len(tokens) < MIN_TOKENS:
        raise InvalidInputError(f"{where} has {len(tokens)} token, expected at least {MIN_TOKENS}; remove it")
    return tokens


def _is_empty(value: Any) -> bool:
    return not value.strip() if isinstance(value, str) else value == []


def _encode(value: str | list[Any], tokenizer: TokenizerLike) -> list[int]:
    if isinstance(value, str):
        return tokenizer.encode(value)
    for message in value:
        if not (
            isinstance(message, dict) and message.get("role") and isinstance(message.get("content"), str)
        ):
            raise InvalidInputError('expected chat messages as [{"role": ..., "content": ...}, ...]')
    return tokenizer.apply_chat_template(value, add_generation_prompt=False)
