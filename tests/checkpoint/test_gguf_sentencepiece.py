"""SentencePiece vocabularies against a plain implementation of its greedy joining, and hostile scores."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kttools.checkpoint.gguf import open_gguf
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.tokenizer import Tokenizer

from .gguf_forge import ARRAY, BOOL, F32, I32, STRING, U32, deepseek2

SPACE = "\u2581"
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEXT = "the cat sat on the mat, then that other thing at the theatre"


def vocabulary() -> tuple[list[str], np.ndarray]:
    """Letters, and every piece of up to six characters of TEXT that occurs twice; scores all different."""
    rng = np.random.default_rng(3)
    spaced = SPACE + TEXT.replace(" ", SPACE)
    letters = sorted(set(spaced))
    pieces = {
        spaced[i : i + n]
        for n in range(2, 7)
        for i in range(len(spaced) - n)
        if spaced.count(spaced[i : i + n]) > 1 and SPACE not in spaced[i + 1 : i + n]
    }
    tokens = [*SPECIAL, *BYTES, *letters, *sorted(pieces)]
    return tokens, -rng.permutation(len(tokens)).astype(np.float32)


TOKENS, SCORES = vocabulary()
TYPES = [2, 3, 3] + [6] * 256 + [1] * (len(TOKENS) - 259)


def changes(**more: Any) -> dict[str, Any]:
    prefix = "tokenizer.ggml."
    values: dict[str, Any] = {
        prefix + "model": (STRING, "llama"),
        prefix + "pre": ...,
        prefix + "merges": ...,
        prefix + "tokens": (ARRAY, (STRING, TOKENS)),
        prefix + "token_type": (ARRAY, (I32, TYPES)),
        prefix + "scores": (ARRAY, (F32, SCORES.tolist())),
        prefix + "bos_token_id": (U32, 1),
        prefix + "eos_token_id": (U32, 2),
        prefix + "unknown_token_id": (U32, 0),
    }
    return values | {prefix + key: value for key, value in more.items()}


def tokenizer(folder: Path, **more: Any) -> Tokenizer:
    model = open_gguf(deepseek2(**changes(**more)).save(folder / "x.gguf"))
    for name, data in model.tokenizer_data.items():
        (folder / name).write_bytes(data)
    return Tokenizer(folder)


def greedy(text: str) -> list[int]:
    """Joins the neighbours with the best score, leftmost first, until none; unknown characters as bytes."""
    ids = {token: i for i, token in enumerate(TOKENS)}
    parts = list(SPACE + text.replace(" ", SPACE))
    while True:
        found = [(-SCORES[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not found:
            break
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    result: list[int] = []
    for part in parts:
        result += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return result


@pytest.mark.parametrize(
    "text",
    [TEXT, "a cat", "theatre theatre", " two  spaces", "caf\u00e9 \u4e2d\u6587", "", "t" * 30, "Zebra!"],
)
def test_as_sentencepiece(tmp_path: Path, text: str) -> None:
    found = tokenizer(tmp_path)
    ids = found.encode(text, add_special_tokens=False)
    assert ids == (greedy(text) if text else [])
    assert found.decode(ids) == text
    assert found.encode(text)[0] == 1
    decoder = found.stream_decoder()
    streamed = "".join(decoder.push(i) for i in ids) + decoder.flush()
    assert streamed == text


def test_without_a_space_before_the_text(tmp_path: Path) -> None:
    found = tokenizer(tmp_path, add_space_prefix=(BOOL, 0), add_bos_token=(BOOL, 0))
    ids = found.encode("cat")
    assert TOKENS[ids[0]][0] == "c"
    assert found.decode(ids) == "cat"


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (..., "required key tokenizer.ggml.scores is missing"),
        ((ARRAY, (F32, [1.0])), "scores has 1 of"),
        ((ARRAY, (F32, [float("nan")] * len(TOKENS))), "must be an array of finite numbers"),
        ((ARRAY, (STRING, ["a"])), "must be an array of numbers"),
    ],
)
def test_hostile_scores(tmp_path: Path, scores: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        open_gguf(deepseek2(**changes(scores=scores)).save(tmp_path / "x.gguf"))
