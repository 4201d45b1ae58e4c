"""The tokenizer of a GGUF file as Hugging Face files (tokenizer.json and its companions).

Byte-pair vocabularies on bytes ("gpt2") with the pre-tokenizers of the families we run, and SentencePiece
("llama"). What a file leaves out (normalisation, where a special token may be cut) is taken as those families
have it.
"""

import json
from typing import Any

import numpy as np

from kttools_runtime.errors import InvalidInputError, UnsupportedModelError

from . import sentencepiece
from .metadata import Metadata
from .pretokenizers import PRE_TOKENIZERS, PreTokenizer

PREFIX = "tokenizer.ggml."
TEMPLATE_KEY = "tokenizer.chat_template"
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
NO_TOKEN = 2**32 - 1  # how some converters wrote that there is none: -1 as u32
SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Ends of turns and messages; each ends an answer.
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def has_vocabulary(metadata: Metadata) -> bool:
    return PREFIX + "tokens" in metadata


def special_id(metadata: Metadata, key: str) -> int | None:
    """A special token's id; raises InvalidInputError when it is not an id of the vocabulary."""
    value = metadata.integer(PREFIX + key, None)
    if value == NO_TOKEN:
        return None
    if value is None or not has_vocabulary(metadata):
        return value
    count = len(metadata.texts(PREFIX + "tokens"))
    if not 0 <= value < count:
        raise InvalidInputError(f"{metadata.where}: {PREFIX}{key} {value} is not one of {count} tokens")
    return int(value)


def end_ids(metadata: Metadata) -> list[int]:
    """Ids that end an answer, without repetition."""
    found = [special_id(metadata, key) for key in END_IDS]
    return list(dict.fromkeys(value for value in found if value is not None))


def tokenizer_files(metadata: Metadata) -> dict[str, bytes]:
    """Content by name. Raises InvalidInputError (inconsistent) or UnsupportedModelError (kind unknown)."""
    model = metadata.text(PREFIX + "model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"{metadata.where}: {PREFIX}model {model!r:.40} is not supported, only gpt2 (byte-level BPE) and "
            "llama (SentencePiece); give the tokenizer's Hugging Face directory with --model_path"
        )
    kind = _pre_tokenizer(metadata) if model == "gpt2" else None
    add_bos = metadata.boolean(PREFIX + "add_bos_token", kind.adds_bos if kind else True)
    bos = special_id(metadata, "bos_token_id") if add_bos else None
    documents = {
        "tokenizer.json": _tokenizer(metadata, kind, bos),
        "tokenizer_config.json": _tokenizer_config(metadata, add_bos),
        "generation_config.json": _generation_config(metadata),
    }
    return {name: json.dumps(value, ensure_ascii=False).encode() for name, value in documents.items()}


def _pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    name = metadata.text(PREFIX + "pre", "gpt-2")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedModelError(
            f"{metadata.where}: {PREFIX}pre {name!r:.40} is not known, only {known}; give the tokenizer's "
            "Hugging Face directory with --model_path"
        )
    return PRE_TOKENIZERS[name]


def _token_types(metadata: Metadata, count: int) -> np.ndarray:
    types = metadata.integers(PREFIX + "token_type", None)
    if types is None:
        return np.ones(count, dtype=np.int32)
    if len(types) != count:
        raise InvalidInputError(f"{metadata.where}: {PREFIX}token_type has {len(types)} of {count} entries")
    return np.asarray(types)


def _tokenizer(metadata: Metadata, kind: PreTokenizer | None, bos: int | None) -> dict[str, Any]:
    """kind: None for SentencePiece."""
    tokens = metadata.texts(PREFIX + "tokens")
    types = _token_types(metadata, len(tokens))
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    if len(vocab) != int((types != UNUSED).sum()):
        raise InvalidInputError(f"{metadata.where}: {PREFIX}tokens names a token twice")
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": bool(types[i] != USER_DEFINED),
        }
        for i, token in enumerate(tokens)
        if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    shared = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    if kind is None:
        return shared | _sentencepiece(metadata, tokens, vocab) | {"post_processor": _template(tokens, bos)}
    return shared | _byte_level(metadata, kind, vocab) | {"post_processor": _post_processor(tokens, bos)}


def _sentencepiece(metadata: Metadata, tokens: list[str], vocab: dict[str, int]) -> dict[str, Any]:
    scores = metadata.numbers(PREFIX + "scores")
    if len(scores) != len(tokens):
        raise InvalidInputError(
            f"{metadata.where}: {PREFIX}scores has {len(scores)} of {len(tokens)} entries"
        )
    unknown = special_id(metadata, "unknown_token_id")
    prefix = metadata.boolean(PREFIX + "add_space_prefix", True)
    return sentencepiece.tokenizer_parts(tokens, vocab, scores, unknown, prefix)


def _byte_level(metadata: Metadata, kind: PreTokenizer, vocab: dict[str, int]) -> dict[str, Any]:
    return {
        "normalizer": {"type": "NFC"} if kind.nfc else None,
        "pre_tokenizer": kind.to_json(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind.ignore_merges,
            "vocab": vocab,
            "merges": _merges(metadata, vocab),
        },
    }


def _merges(metadata: Metadata, vocab: dict[str, int]) -> list[list[str]]:
    """Pairs in the order of their rank; every part and every result must be a token."""
    pairs = []
    for rank, merge in enumerate(metadata.texts(PREFIX + "merges", [])):
        left, space, right = merge.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise InvalidInputError(
                f"{metadata.where}: {PREFIX}merges[{rank}] {merge!r:.80} is no pair of tokens"
            )
        pairs.append([left, right])
    return pairs


def _post_processor(tokens: list[str], bos: int | None) -> dict[str, Any]:
    """Byte offsets, and the beginning-of-sentence token before a plain text."""
    trim = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    template = _template(tokens, bos)
    return trim if template is None else {"type": "Sequence", "processors": [trim, template]}


def _template(tokens: list[str], bos: int | None) -> dict[str, Any] | None:
    if bos is None:
        return None
    special = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
    }


def _tokenizer_config(metadata: Metadata, add_bos: bool) -> dict[str, Any]:
    tokens = metadata.texts(PREFIX + "tokens")
    config: dict[str, Any] = {
        "add_bos_token": add_bos,
        "add_eos_token": metadata.boolean(PREFIX + "add_eos_token", False),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, key in SPECIAL_IDS.items():
        value = special_id(metadata, key)
        config[name] = None if value is None else tokens[value]
    template = metadata.text(TEMPLATE_KEY, None)
    if template is not None:
        config["chat_template"] = template
    return config


def _generation_config(metadata: Metadata) -> dict[str, Any]:
    config: dict[str, Any] = {"bos_token_id": special_id(metadata, "bos_token_id")}
    ends = end_ids(metadata)
    config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    sampling = {
        name: metadata.values[f"general.sampling.{key}"]
        for name, key in SAMPLING.items()
        if f"general.sampling.{key}" in metadata
    }
    return config | ({"do_sample": True} | sampling if sampling else {})
