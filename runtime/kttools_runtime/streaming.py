"""Token ids to text as they arrive: byte-correct UTF-8, and the parts a model writes as its thinking."""

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol


class Stepper(Protocol):
    """What a StreamDecoder needs: the text made certain by one more token, and the rest at the end."""

    def step(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


def byte_alphabet() -> dict[str, int]:
    """The 256 printable characters that byte-level BPE writes for bytes (GPT-2's table), as char -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


ALPHABET = byte_alphabet()


def token_bytes(token: str) -> bytes:
    """Bytes of one byte-level BPE token; a token with a character outside the alphabet is literal text."""
    if all(char in ALPHABET for char in token):
        return bytes(ALPHABET[char] for char in token)
    return token.encode()


class ByteStepper:
    """Byte-level vocabularies: an incremental UTF-8 decoder over the tokens' bytes.

    bytes_of: bytes per token id; ids without an entry (special tokens) add nothing.
    """

    def __init__(self, bytes_of: Mapping[int, bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of.get(token_id, b""))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class StreamDecoder:
    """Feeds tokens to a stepper and keeps the text so far.

    push() returns the text that is certain after this token ("" while a character is incomplete), flush()
    what was held back (incomplete bytes become U+FFFD). The pieces join to what decode() gives at once.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper

    def push(self, token_id: int) -> str:
        return self._stepper.step(token_id)

    def flush(self) -> str:
        return self._stepper.flush()

    def stream(self, token_ids: Iterator[int]) -> Iterator[str]:
        """Non-empty pieces of text for a stream of ids, flushed at its end."""
        for token_id in token_ids:
            if piece := self.push(token_id):
                yield piece
        if piece := self.flush():
            yield piece


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of an answer; the tags themselves belong to the thinking."""

    text: str
    is_thinking: bool


class ThinkingMarker:
    """Splits streamed text into answer and thinking at <think> and </think>, whichever pieces they arrive in.

    is_thinking: True when the prompt already opened the tag.
    """

    OPEN, CLOSE = "<think>", "</think>"

    def __init__(self, is_thinking: bool = False) -> None:
        self.is_thinking = is_thinking
        self._held = ""

    def push(self, text: str) -> list[Segment]:
        """Segments that are certain; the start of a possible tag is held back."""
        self._held += text
        segments: list[Segment] = []
        while (at := self._held.find(self._tag)) >= 0:
            self._take_tag(at, segments)
        keep = self._partial_tag_length()
        self._emit(self._held[: len(self._held) - keep], segments)
        self._held = self._held[len(self._held) - keep :]
        return segments

    def flush(self) -> list[Segment]:
        """What was held back, as it stands."""
        segments: list[Segment] = []
        self._emit(self._held, segments)
        self._held = ""
        return segments

    @property
    def _tag(self) -> str:
        return self.CLOSE if self.is_thinking else self.OPEN

    def _take_tag(self, at: int, segments: list[Segment]) -> None:
        tag = self._tag
        if self.is_thinking:
            self._emit(self._held[: at + len(tag)], segments)
            self.is_thinking = False
        else:
            self._emit(self._held[:at], segments)
            self.is_thinking = True
            self._emit(tag, segments)
        self._held = self._held[at + len(tag) :]

    def _emit(self, text: str, segments: list[Segment]) -> None:
        if text:
            segments.append(Segment(text, self.is_thinking))

    def _partial_tag_length(self) -> int:
        """Length of the longest end of the held text that could begin the awaited tag."""
        tag = self._tag
        longest = min(len(tag) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(tag[:n])), 0)
