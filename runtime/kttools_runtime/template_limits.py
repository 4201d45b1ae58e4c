"""Bounds on what a chat template may build: sizes are computed before anything is allocated."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MAX_VALUE_CHARS = 16 << 20
MAX_ITEMS = 1 << 20
MAX_WIDTH = 1000  # of indent; other numbers given to calls may be 100 times that
MAX_INT_BITS = 4096


class TemplateLimitError(Exception):
    """The template asked for more steps, time or memory than a chat template needs."""


def measure(value: object) -> int:
    """Characters plus items reachable from value; raises TemplateLimitError beyond the limits of both."""
    total, items, stack = 0, 0, [value]
    while stack:
        item = stack.pop()
        items += 1
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, Mapping):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend(item)
        if total > MAX_VALUE_CHARS or items + len(stack) > MAX_ITEMS:
            raise TemplateLimitError(
                f"a value grows beyond {MAX_VALUE_CHARS} characters or {MAX_ITEMS} items"
            )
    return total + items


def check_size(size: int) -> None:
    if size > MAX_VALUE_CHARS:
        raise TemplateLimitError(f"a value would grow to {size} characters, the limit is {MAX_VALUE_CHARS}")


def check_width(args: Iterable[object]) -> None:
    for arg in args:
        if isinstance(arg, int) and not isinstance(arg, bool) and abs(arg) > 100 * MAX_WIDTH:
            raise TemplateLimitError(f"the number {arg} is too large an argument")


def check_replace(text: object, old: object = "", new: object = "", *_: object) -> None:
    text, old, new = str(text), str(old), str(new)
    hits = text.count(old) if old else len(text) + 1
    check_size(len(text) + hits * len(new))


def check_join(items: object, separator: object = "", *_: object) -> list[Any]:
    listed = list(items) if isinstance(items, Iterable) else []
    check_size(measure(listed) + len(listed) * len(str(separator)))
    return listed


def check_indent(text: object, width: object = 4, *_: object) -> None:
    pad = len(width) if isinstance(width, str) else width
    if not isinstance(pad, int) or abs(pad) > MAX_WIDTH:
        raise TemplateLimitError(f"indent by {width!r}, the limit is {MAX_WIDTH}")
    check_size(len(str(text)) + str(text).count("\n") * abs(pad))


def check_multiply(left: Any, right: Any) -> None:
    for sequence, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(sequence, (str, bytes, list, tuple)):
            check_size(len(sequence) * max(times, 0))
    if isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() + right.bit_length())


def check_bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise TemplateLimitError(f"an integer would grow to {bits} bits")


def check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() * max(right, 1))


def check_add(left: Any, right: Any) -> None:
    if not all(isinstance(value, (str, bytes, list, tuple)) for value in (left, right)):
        return
    check_size(len(left) + len(right))
    if isinstance(left, (list, tuple)) and len(left) + len(right) > MAX_ITEMS:
        raise TemplateLimitError(f"a list grows beyond {MAX_ITEMS} items")


def check_percent(left: Any, right: Any) -> None:
    if isinstance(left, (str, bytes)):
        if re.search(r"\d{4}|\*", str(left)):
            raise TemplateLimitError("a width in a % format is too large")
        check_size(measure(left) + measure(right))


BINOP_CHECKS: dict[str, Callable[[Any, Any], None]] = {
    "*": check_multiply,
    "**": check_power,
    "+": check_add,
    "%": check_percent,
}
