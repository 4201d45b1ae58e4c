"""What a tokenizer.json may ask of the tokenizers library, which itself bounds neither time nor memory.

Checked before the library sees the file: how far normalizers and decoders can make a text grow, what a
template adds to it, and regular expressions whose matching time explodes. Every tokenizer of the supported
families is far within these bounds.
"""

import re
from collections.abc import Iterator
from typing import Any, NoReturn

MAX_STEPS = 64  # normalizers, pre-tokenizers, decoders and post-processors, each of its kind, nested ones too
MAX_GROWTH = 4096  # characters made of one
MAX_ADDED_IDS = 4096  # by a template
MAX_PATTERN_CHARS = 16_384
MAX_CHARSMAP_CHARS = 2 << 20
MAX_REPEAT = 1000
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
CHILDREN = ("normalizers", "pretokenizers", "decoders", "processors")
_QUANTIFIER = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")


class TokenizerLimitError(Exception):
    """The file asks for more time or memory than a tokenizer needs."""


def check_tokenizer(document: Any) -> None:
    """document: the parsed tokenizer.json. Raises TokenizerLimitError; malformed parts are left alone."""
    if not isinstance(document, dict):
        return
    for part in PARTS:
        growth = 1
        for count, step in enumerate(_steps(document.get(part))):
            if count >= MAX_STEPS:
                _refuse(f"{part}: more than {MAX_STEPS} steps")
            growth *= _growth(step)
            if growth > MAX_GROWTH:
                _refuse(f"{part}: a text could grow to more than {MAX_GROWTH} times its length")
            _check_patterns(step, part)
            _check_template(step)


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """A step and those inside it, depth first, without recursion."""
    stack = [value]
    while stack:
        step = stack.pop()
        if isinstance(step, dict):
            yield step
            for name in CHILDREN:
                children = step.get(name)
                stack.extend(reversed(children) if isinstance(children, list) else [])


def _growth(step: dict[str, Any]) -> int:
    """At most so many characters come out of one that goes in."""
    kind = step.get("type")
    if kind == "Precompiled" and len(str(step.get("precompiled_charsmap"))) > MAX_CHARSMAP_CHARS:
        _refuse(f"precompiled_charsmap of more than {MAX_CHARSMAP_CHARS} characters")
    texts = [step.get(key) for key in ("content", "prepend", "replacement", "prefix", "suffix")]
    longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
    if kind == "Replace":
        pattern = step.get("pattern")
        plain = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(plain, str) and plain:
            return max(1, -(-longest // len(plain)))
        return longest + 1
    return max(1, longest)


def _check_patterns(step: dict[str, Any], part: str) -> None:
    pattern = step.get("pattern")
    text = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(text, str):
        problem = pattern_problem(text)
        if problem:
            _refuse(f"{part}: regular expression {text[:60]!r}: {problem}")


def _check_template(step: dict[str, Any]) -> None:
    tokens = step.get("special_tokens")
    added = {}
    for name, token in tokens.items() if isinstance(tokens, dict) else ():
        ids = token.get("ids") if isinstance(token, dict) else None
        added[name] = len(ids) if isinstance(ids, list) else 0
    for form in ("single", "pair"):
        pieces = step.get(form)
        total = 0
        for piece in pieces if isinstance(pieces, list) else ():
            special = piece.get("SpecialToken") if isinstance(piece, dict) else None
            total += added.get(str(special.get("id")), 1) if isinstance(special, dict) else 1
        if total > MAX_ADDED_IDS:
            _refuse(f"a template adds {total} tokens, the limit is {MAX_ADDED_IDS}")


def pattern_problem(pattern: str) -> str | None:
    """Why a regular expression could take for ever: a repeated choice or repetition, or a back reference.

    `(a+)+`, `(a|aa)*` and their like are what exponential backtracking needs, and no tokenizer uses them.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        return f"{len(pattern)} characters, the limit is {MAX_PATTERN_CHARS}"
    branching = [False]  # of each open group: has it a choice or an unbounded repetition inside
    ended: bool | None = None  # of the group that was closed just before
    at = 0
    while at < len(pattern):
        char, last = pattern[at], pattern[at - 1 : at]
        found = _QUANTIFIER.match(pattern, at)
        if found and not (char == "?" and last == "("):
            is_possessive = char == "+" and last in ("?", "*", "+")
            if _is_unbounded(found) and not is_possessive:
                if ended:
                    return "a repetition of something that repeats or branches"
                branching[-1] = True
            at = found.end()
            continue
        ended = None
        if char == "\\":
            if pattern[at + 1 : at + 2] in set("123456789kg"):
                return "a back reference"
            at += 1
        elif char == "[":
            at = _class_end(pattern, at)
        elif char == "(":
            branching.append(False)
        elif char == ")" and len(branching) > 1:
            ended = branching.pop()
            branching[-1] |= ended
        elif char == "|":
            branching[-1] = True
        at += 1
    return None


def _is_unbounded(quantifier: "re.Match[str]") -> bool:
    text = quantifier[0]
    if text[0] != "{":
        return text in "*+"
    low, comma, high = quantifier.groups()
    most = int((high if comma else low)[:9] or 0)
    return (bool(comma) and not high) or most > MAX_REPEAT


def _class_end(pattern: str, at: int) -> int:
    """Position of the ] that closes the class opened at `at`; classes may be nested."""
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return at


def _refuse(problem: str) -> NoReturn:
    raise TokenizerLimitError(problem)
