"""A Hugging Face tokenizer as GGUF pairs: tokenizer.ggml.*, chat template, special ids, sampling."""

import json
from collections.abc import Mapping
from typing import Any

from kttools.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS
from kttools.checkpoint.gguf.vocabulary import (
    CONTROL,
    PREFIX,
    SAMPLING,
    SPECIAL_IDS,
    TEMPLATE_KEY,
    UNUSED,
    USER_DEFINED,
)
from kttools_runtime.errors import InvalidInputError, UnsupportedModelError

from .pairs import Typed, typed

NORMAL = 1
# Added tokens that a checkpoint does not call special although they are: DeepSeek's <|User|> with its own
# full-width bars, and the plain form.
SPECIAL_EDGES = (("<|", "|>"), ("<\uff5c", "\uff5c>"))


def vocabulary_pairs(files: Mapping[str, bytes], vocab_size: int, where: str) -> dict[str, Typed]:
    """Pairs for the content of tokenizer.json and its companions; {} without a tokenizer.json.

    Raises InvalidInputError (not what it must be) or UnsupportedModelError (no GGUF name for its kind).
    """
    if "tokenizer.json" not in files:
        return {}
    tokenizer = _object(files, "tokenizer.json", where)
    config = _object(files, "tokenizer_config.json", where)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UnsupportedModelError(f"{where}: tokenizer.json: only byte-level BPE can be written as GGUF")
    tokens, types = _tokens(tokenizer, vocab_size, where)
    pairs = {
        PREFIX + "model": typed("gpt2"),
        PREFIX + "pre": typed(_kind(tokenizer, where)),
        PREFIX + "tokens": Typed("array of string", tokens),
        PREFIX + "token_type": Typed("array of i32", types),
        PREFIX + "merges": Typed("array of string", [_merge(merge) for merge in model.get("merges", [])]),
    }
    for name, key in SPECIAL_IDS.items():
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if text in tokens:
            pairs[PREFIX + key] = typed(tokens.index(text))
    for flag in ("add_bos_token", "add_eos_token"):
        if isinstance(config.get(flag), bool):
            pairs[PREFIX + flag] = typed(config[flag])
    return pairs | _template(files, config) | _sampling(_object(files, "generation_config.json", where))


def _tokens(tokenizer: dict[str, Any], vocab_size: int, where: str) -> tuple[list[str], list[int]]:
    """Text and type of every id below vocab_size; ids without a token become unused ones."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    added = {token["content"]: token for token in tokenizer.get("added_tokens", [])}
    ids = {**tokenizer["model"]["vocab"], **{text: token["id"] for text, token in added.items()}}
    for text, i in ids.items():
        if type(i) is not int or not 0 <= i < vocab_size:
            raise InvalidInputError(
                f"{where}: tokenizer.json: id {i!r:.40} is not below vocab_size {vocab_size}"
            )
        tokens[i], types[i] = text, NORMAL
        if text in added:
            types[i] = CONTROL if _is_special(added[text]) else USER_DEFINED
    return tokens, types


def _is_special(token: dict[str, Any]) -> bool:
    text = token["content"]
    return bool(token.get("special")) or any(
        text.startswith(a) and text.endswith(b) for a, b in SPECIAL_EDGES
    )


def _kind(tokenizer: dict[str, Any], where: str) -> str:
    """The GGUF name whose pre-tokenizer this one is; raises UnsupportedModelError when none is."""
    found = tokenizer.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    patterns = tuple(
        step.get("pattern", {}).get("Regex", "") for step in steps if step.get("type") == "Split"
    )
    ignores = bool(tokenizer["model"].get("ignore_merges"))
    has_nfc = "NFC" in json.dumps(tokenizer.get("normalizer"))
    for name, kind in PRE_TOKENIZERS.items():
        if (kind.patterns, kind.ignore_merges, kind.nfc) == (patterns, ignores, has_nfc):
            return name
    raise UnsupportedModelError(f"{where}: tokenizer.json: its pre-tokenizer has no GGUF name we know")


def _merge(merge: Any) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _template(files: Mapping[str, bytes], config: dict[str, Any]) -> dict[str, Typed]:
    if "chat_template.jinja" in files:
        return {TEMPLATE_KEY: typed(files["chat_template.jinja"].decode("utf-8"))}
    template = config.get("chat_template")
    return {TEMPLATE_KEY: typed(template)} if isinstance(template, str) else {}


def _sampling(generation: dict[str, Any]) -> dict[str, Typed]:
    kinds = {"top_k": int}
    if not generation.get("do_sample"):
        return {}
    return {
        f"general.sampling.{key}": typed(kinds.get(name, float)(generation[name]))
        for name, key in SAMPLING.items()
        if isinstance(generation.get(name), int | float)
    }


def _object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise InvalidInputError(f"{where}: {name}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidInputError(f"{where}: {name}: expected a JSON object")
    return value
