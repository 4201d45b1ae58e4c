"""Tokenizer files that would take for ever, or all memory: refused before the library sees them."""

import json
from pathlib import Path
from typing import Any

import pytest

from kttools_runtime.errors import InvalidInputError
from kttools_runtime.tokenizer import Tokenizer
from kttools_runtime.tokenizer_limits import check_tokenizer, pattern_problem

# What the families' own files use.
REAL = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"\s+(?!\S)|\s+",
]
EXPLODING = [
    "(a+)+$",
    "(a|aa)+$",
    "(a*)*b",
    "((a|b)*c)*",
    "(?:x+x+)+y",
    "(a+){2,}",
    "(a+){5000}",
    r"([ab]+)\1",
    r"(?<x>a)\k<x>",
    r"(?<x>a\g<x>?)",
    "a" * 20_000,
]


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def sequence(steps: list[Any], key: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", key: steps}


def tokenizer(**parts: Any) -> dict[str, Any]:
    empty = dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "aa": 2}, "merges": [["a", "a"]], "unk_token": None}
    return {"version": "1.0", "added_tokens": [], "model": model} | empty | parts


def template(count: int, ids: int) -> dict[str, Any]:
    piece = {"SpecialToken": {"id": "a", "type_id": 0}}
    special = {"a": {"id": "a", "ids": [0] * ids, "tokens": ["a"] * ids}}
    single = [piece] * count + [{"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    **{f"regex {p[:12]}": (tokenizer(pre_tokenizer=split(p)), "regular expression") for p in EXPLODING},
    "regex in a normalizer": (tokenizer(normalizer=split("(a+)+")), "normalizer: regular expression"),
    "doubling": (tokenizer(normalizer=sequence([replace("a", "aa")] * 40)), "could grow"),
    "one long replacement": (tokenizer(normalizer=replace("a", "a" * 5000)), "could grow"),
    "replacement of nothing": (tokenizer(normalizer=replace("", "a" * 5000)), "could grow"),
    "long prefix": (tokenizer(normalizer={"type": "Prepend", "prepend": "a" * 5000}), "could grow"),
    "doubling in the decoder": (
        tokenizer(decoder=sequence([replace("a", "aa")] * 13, "decoders")),
        "decoder: a text could grow",
    ),
    "many steps": (tokenizer(normalizer=sequence([{"type": "Lowercase"}] * 100)), "more than 64 steps"),
    "long template": (tokenizer(post_processor=template(5000, 1)), "a template adds"),
    "heavy template": (tokenizer(post_processor=template(1, 5000)), "a template adds 5001 tokens"),
    "charsmap": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "A" * (3 << 20)}),
        "precompiled_charsmap",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused(tmp_path: Path, name: str) -> None:
    document, message = HOSTILE[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InvalidInputError, match=message) as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_panic_of_the_library_is_invalid_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own limit on backtracking, met behind our check."""
    monkeypatch.setattr("kttools_runtime.tokenizer_limits.pattern_problem", lambda pattern: None)
    document = tokenizer(pre_tokenizer=split("(a+)+$"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InvalidInputError, match="cannot encode this text"):
        Tokenizer(tmp_path).encode("a" * 40 + "b")


@pytest.mark.parametrize("pattern", REAL)
def test_real_patterns_pass(pattern: str) -> None:
    assert pattern_problem(pattern) is None


@pytest.mark.parametrize("pattern", EXPLODING)
def test_exploding_patterns_do_not(pattern: str) -> None:
    assert pattern_problem(pattern) is not None


def test_what_is_malformed_is_left_to_the_library() -> None:
    steps: list[Any] = [None, 1, [], {}, {"type": 1}, {"pattern": 1}, {"normalizers": 1}]
    for value in (
        None,
        [],
        "x",
        {"normalizer": sequence(steps)},
        {"post_processor": {"special_tokens": [1]}},
    ):
        check_tokenizer(value)
    deep: dict[str, Any] = {}
    for _ in range(60):
        deep = sequence([deep])
    check_tokenizer({"normalizer": deep})
