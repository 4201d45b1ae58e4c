"""Recipe files: lines `pattern = format` that give single experts and linears formats of their own.

    # the last line that matches wins
    layers.*.experts.* = int4          # every routed expert
    layers.3-5.experts.0-7,12 = int8   # eight and one of three layers
    layers.*.self_attn.kv_b_proj = int8
    lm_head = bf16

A pattern is a tensor's canonical name without `model.` and `.weight`; an expert is `layers.L.experts.E`. `*`
stands for anything within one part of the name, `**` also for dots; where a part is a number, ranges and
lists of numbers are understood.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from kttools_runtime.errors import InvalidInputError, UsageError
from kttools_runtime.strict_json import read_bounded

MAX_BYTES = 1 << 20
MAX_INDEX = 9999
# The blocks of a GGUF file kept as they are, of whatever kinds it has; of experts and linears.
KEPT_FORMAT = "q4_k"
RULE_FORMATS = ("bf16", "int8", "int4", "int4_g32", "int4_g64", "int4_g128", KEPT_FORMAT)
_NUMBERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_GLOB = re.compile(r"[A-Za-z0-9_*]+")


@dataclass(frozen=True, slots=True)
class Rule:
    """One line. where: file and line for messages, not part of what the rule is."""

    pattern: str
    format: str
    where: str = field(default="", compare=False)

    def matches(self, name: str) -> bool:
        """name: as expert_name() and linear_name() give it."""
        return _compiled(self.pattern).fullmatch(name) is not None


def expert_name(layer: int, expert: int) -> str:
    return f"layers.{layer}.experts.{expert}"


def linear_name(canonical: str) -> str:
    """model.layers.3.self_attn.o_proj.weight -> layers.3.self_attn.o_proj"""
    return canonical.removeprefix("model.").removesuffix(".weight")


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Raises InvalidInputError with file and line for a line that is no rule."""
    try:
        text = read_bounded(path, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInputError(f"{path}: not UTF-8 text") from None
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if content:
            rules.append(_rule(content, f"{path}:{number}"))
    if not rules:
        raise InvalidInputError(f"{path}: holds no rule; expected lines PATTERN = FORMAT")
    return tuple(rules)


def check_all_match(rules: Iterable[Rule], names: Iterable[str]) -> None:
    """Raises InvalidInputError for the first rule that matches no name: most likely a slip of the pen."""
    known = list(names)
    for rule in rules:
        if not any(rule.matches(name) for name in known):
            raise InvalidInputError(
                f"{rule.where}: {rule.pattern} matches no expert and no linear of this model; "
                f"names are like {', '.join(dict.fromkeys((known[0], known[-1])))}"
            )


def deciding(rules: tuple[Rule, ...], name: str) -> Rule | None:
    """The last rule that matches, or None."""
    return next((rule for rule in reversed(rules) if rule.matches(name)), None)


def _rule(content: str, where: str) -> Rule:
    pattern, equals, format_name = (part.strip() for part in content.partition("="))
    if not equals or not pattern or not format_name:
        raise InvalidInputError(f"{where}: expected PATTERN = FORMAT, got {content!r:.120}")
    if format_name not in RULE_FORMATS:
        expected = ", ".join(RULE_FORMATS)
        raise InvalidInputError(f"{where}: unknown format {format_name!r:.40}: expected one of {expected}")
    short = linear_name(pattern).replace(".mlp.experts.", ".experts.")
    try:
        _compiled(short)
    except UsageError as error:
        raise InvalidInputError(f"{where}: {error}") from None
    return Rule(short, format_name, where)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(r"\.".join(map(_part, pattern.split("."))))


def _part(part: str) -> str:
    """One part of a pattern as a regular expression. Raises UsageError."""
    if _NUMBERS.fullmatch(part):
        return f"(?:{'|'.join(map(str, _indices(part)))})"
    if part == "**":
        return ".+"
    if not _GLOB.fullmatch(part) or "**" in part:
        raise UsageError(f"{part!r:.60} is no part of a pattern: expected a name, * or numbers like 0-7,12")
    return part.replace("*", "[^.]*")


def _indices(part: str) -> list[int]:
    found: list[int] = []
    for piece in part.split(","):
        first, _, last = piece.partition("-")
        begin, end = int(first[:9]), int((last or first)[:9])
        if not begin <= end <= MAX_INDEX:
            raise UsageError(f"{piece:.40} is no range of numbers up to {MAX_INDEX}")
        found.extend(range(begin, end + 1))
    return found
