"""SentencePiece vocabularies (tokenizer.ggml.model "llama") as tokenizer.json: byte-pair merges from scores.

SentencePiece joins the neighbours whose union is a token of the highest score, until none is left, and writes
what is no token as bytes. As BPE that is a list of merges in the order of the scores of what they make.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

SPACE = "\u2581"  # stands for a space inside tokens
MAX_TOKEN_CHARS = 64  # longer ones (the trainer makes none over 16 by default) are only found whole


def merges(vocab: dict[str, int], scores: np.ndarray) -> list[list[str]]:
    """Every way to make a token of two others, best score first; among equals the lower ids first."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, i in vocab.items():
        if len(token) > MAX_TOKEN_CHARS:
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((-float(scores[i]), left, right, token[:cut], token[cut:]))
    return [[left, right] for _, _, _, left, right in sorted(found)]


def tokenizer_parts(
    tokens: Sequence[str], vocab: dict[str, int], scores: np.ndarray, unknown: int | None, prefix: bool
) -> dict[str, Any]:
    """normalizer, pre_tokenizer, decoder and model of tokenizer.json. prefix: a space before every text."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*([prepend] if prefix else []), replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges(vocab, scores),
        },
    }
