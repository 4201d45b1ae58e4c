"""Text as windows of tokens: each a run of one document, no longer than asked, at least two tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kttools.profiling.data import TokenizerLike, documents, parse_spec
from kttools_runtime.errors import UsageError

MIN_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens, each but the first predicted from those before it. document: unique in its domain."""

    domain: str
    document: str
    token_ids: tuple[int, ...]

    @property
    def predicted(self) -> int:
        return len(self.token_ids) - 1


def read_windows(
    specs: Sequence[str], tokenizer: TokenizerLike, size: int, max_tokens: int | None
) -> list[Window]:
    """Windows of all specs in order; max_tokens: of each domain. Raises UsageError or InvalidInputError."""
    parsed = [parse_spec(spec) for spec in specs]
    names = [spec.domain for spec in parsed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"two data specs are of domain {twice}; name them apart: NAME=KIND:LOCATION")
    return [
        Window(document.domain, document.id, tuple(piece))
        for spec in parsed
        for document in documents(spec, tokenizer, max_tokens)
        for piece in _pieces(document.token_ids, size)
    ]


def _pieces(token_ids: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    for begin in range(0, len(token_ids), size):
        piece = token_ids[begin : begin + size]
        if len(piece) >= MIN_TOKENS:
            yield piece
