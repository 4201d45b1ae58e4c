"""Streaming: bytes never torn, thinking tags found however they arrive."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from kttools_runtime.streaming import ByteStepper, StreamDecoder, ThinkingMarker, byte_alphabet, token_bytes
from kttools_runtime.tokenizer import Tokenizer

BYTES = {i: bytes([i]) for i in range(256)}


def byte_decoder() -> StreamDecoder:
    """One token per byte: the hardest vocabulary for UTF-8."""
    return StreamDecoder(ByteStepper(BYTES))


def test_alphabet_is_a_bijection() -> None:
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_token_outside_the_alphabet_is_literal() -> None:
    assert token_bytes("<\uff5cUser\uff5c>") == "<\uff5cUser\uff5c>".encode()
    assert token_bytes("\u0120a") == b" a"


def test_a_character_waits_for_its_last_byte() -> None:
    decoder = byte_decoder()
    assert [decoder.push(b) for b in "\U0001f600".encode()] == ["", "", "", "\U0001f600"]
    assert decoder.flush() == ""


def test_an_incomplete_character_is_replaced_at_the_end() -> None:
    decoder = byte_decoder()
    assert [decoder.push(b) for b in b"a\xe4\xbd"] == ["a", "", ""]
    assert decoder.flush() == "\ufffd"


@given(st.binary(max_size=64))
def test_pieces_join_to_the_whole(data: bytes) -> None:
    assert "".join(byte_decoder().stream(iter(data))) == data.decode("utf-8", "replace")


def test_random_ids_stream_as_they_decode(nano_checkpoint: Path) -> None:
    tokenizer, draw = Tokenizer(nano_checkpoint), random.Random(1)
    for length in (1, 7, 200):
        for skip in (True, False):
            ids = [draw.randrange(tokenizer.vocab_size) for _ in range(length)]
            streamed = "".join(tokenizer.stream_decoder(skip_special_tokens=skip).stream(iter(ids)))
            assert streamed == tokenizer.decode(ids, skip_special_tokens=skip)


def test_special_tokens_are_not_streamed(nano_checkpoint: Path) -> None:
    tokenizer = Tokenizer(nano_checkpoint)
    decoder = tokenizer.stream_decoder()
    assert decoder.push(tokenizer.eos_token_id or 0) == ""
    assert tokenizer.stream_decoder(skip_special_tokens=False).push(1) == "<|end_of_sentence|>"


def test_vocabulary_with_byte_fallback(tmp_path: Path) -> None:
    """Sentencepiece-like vocabularies go through the library's own incremental decoder."""
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "\u2581a": 257, "b": 258}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    emoji = [b + 1 for b in "\U0001f600".encode()]
    ids = [257, 258, *emoji, 257]
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(i) for i in ids]
    assert pieces[2:5] == ["", "", ""]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids) == "ab\U0001f600 a"
    torn = tokenizer.stream_decoder()
    assert "".join(torn.push(i) for i in ids[:4]) == "ab"
    assert "\ufffd" in torn.flush()


def mark(pieces: list[str], is_thinking: bool = False) -> list[tuple[str, bool]]:
    marker = ThinkingMarker(is_thinking)
    segments = [s for piece in pieces for s in marker.push(piece)] + marker.flush()
    merged: list[tuple[str, bool]] = []
    for s in segments:
        if merged and merged[-1][1] == s.is_thinking:
            merged[-1] = (merged[-1][0] + s.text, s.is_thinking)
        else:
            merged.append((s.text, s.is_thinking))
    return merged


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_thinking_is_marked_in_any_pieces(size: int) -> None:
    text = "a < b <think>why\n</think>because <b>"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert mark(pieces) == [("a < b ", False), ("<think>why\n</think>", True), ("because <b>", False)]


def test_a_prompt_that_opened_the_tag() -> None:
    assert mark(["x</thi", "nk>y"], is_thinking=True) == [("x</think>", True), ("y", False)]


def test_unfinished_tag_is_text() -> None:
    assert mark(["a<thin"]) == [("a<thin", False)]
    assert mark(["<think>a</"]) == [("<think>a</", True)]


def test_ordinary_text_is_not_held_back() -> None:
    assert [s.text for s in ThinkingMarker().push("hello")] == ["hello"]
