"""How each kind cuts a text, piece by piece, as the models' own tokenizers do."""

import json

import pytest
from tokenizers import Tokenizer

from kttools.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS, character_class

TEXT = "It's 12345 \u00c9a\u0561 \u4e2d\u6587\u304b x\n\n y  "
HAN = "\u4e2d\u6587"
EXPECTED = {
    "gpt-2": ["It", "'s", " 12345", " \u00c9a\u0561", f" {HAN}\u304b", " x", "\n\n", " y", "  "],
    # Its third pattern, meant for punctuation, says :-~ and so cuts ASCII letters from others, too.
    "deepseek-llm": [
        *("It", "'", "s", " ", "12345", " \u00c9", "a", "\u0561 ", f"{HAN}\u304b"),
        *(" x", "\n", "\n", " y", "  "),
    ],
    "deepseek-v3": [
        *("It", "'s", " ", "123", "45", " \u00c9a\u0561", " ", f"{HAN}\u304b", " x", "\n\n", " y", "  ")
    ],
    "qwen2": [
        *(
            "It",
            "'s",
            " ",
            "1",
            "2",
            "3",
            "4",
            "5",
            " \u00c9a\u0561",
            f" {HAN}\u304b",
            " x",
            "\n\n",
            " y",
            "  ",
        )
    ],
    "glm4": ["It", "'s", " ", "123", "45", " \u00c9a\u0561", f" {HAN}\u304b", " x", "\n\n", " y", "  "],
    "gpt-4o": ["It's", " ", "123", "45", " \u00c9a\u0561", f" {HAN}\u304b", " x", "\n\n", " y", "  "],
    "kimi-k2": ["It's", " ", "123", "45", " \u00c9a\u0561", " ", HAN, "\u304b", " x", "\n\n", " y", "  "],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_pieces(name: str) -> None:
    document = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[name].to_json(),
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }
    backend = Tokenizer.from_str(json.dumps(document))
    assert backend.pre_tokenizer is not None
    spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert [TEXT[begin:end] for begin, end in spans] == EXPECTED[name]


def test_character_class() -> None:
    assert character_class("41-43 5a b5") == "[A-CZ\u00b5]"
