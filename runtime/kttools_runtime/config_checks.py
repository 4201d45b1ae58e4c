"""Checks of configuration fields: each takes a value and returns what was expected instead, or None."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import field
from itertools import pairwise
from typing import Any, NoReturn

from .errors import InvalidInputError

# Bounds against hostile files: far above any model, far below what would exhaust memory in a loop.
MAX_DIMENSION = 2**31 - 1
MAX_LAYERS = 4096
MAX_EXPERTS = 65536

Check = Callable[[Any], str | None]


def integer(low: int, high: int) -> Check:
    def check(value: Any) -> str | None:
        if type(value) is int and low <= value <= high:
            return None
        return f"an integer in {low}..{high}"

    return check


def number(low: float, *, exclusive: bool = False) -> Check:
    def check(value: Any) -> str | None:
        is_finite = type(value) is float and math.isfinite(value)
        if is_finite and (value > low or (value == low and not exclusive)):
            return None
        return f"a finite number {'above' if exclusive else 'of at least'} {low:g}"

    return check


def boolean(value: Any) -> str | None:
    return None if type(value) is bool else "true or false"


def one_of(*kinds: str) -> Check:
    def check(value: Any) -> str | None:
        return None if type(value) is str and value in kinds else f"one of {', '.join(kinds)}"

    return check


def ascending(value: Any) -> str | None:
    is_ints = type(value) is tuple and all(type(item) is int and item >= 0 for item in value)
    if is_ints and all(a < b for a, b in pairwise(value)):
        return None
    return "an ascending list of layer indices"


def token_ids(value: Any) -> str | None:
    is_ints = type(value) is tuple and all(type(item) is int and item >= 0 for item in value)
    return None if is_ints and len(set(value)) == len(value) else "a list of distinct token ids"


def optional(check: Check) -> Check:
    def checked(value: Any) -> str | None:
        expected = None if value is None else check(value)
        return f"null or {expected}" if expected else None

    return checked


DIMENSION = integer(1, MAX_DIMENSION)
DIMENSION_OR_0 = integer(0, MAX_DIMENSION)
POSITIVE = number(0.0, exclusive=True)
FINITE = number(-math.inf, exclusive=True)


def checked(check: Check) -> Any:
    """A required dataclass field with its check; Any, so that the annotation at the field is the type."""
    return field(metadata={"check": check})


def defaulted(default: Any, check: Check) -> Any:
    """A field that a dict leaves out when it has its default; see BUNDLE.md, "Keys with a default"."""
    return field(default=default, metadata={"check": check})


def check_fields(instance: Any, prefix: str) -> None:
    """Raises InvalidInputError for the first field whose value its check refuses."""
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        expected = f.metadata["check"](value)
        if expected:
            refuse(prefix + f.name, expected, value)


def arguments(cls: type, values: Any, prefix: str) -> dict[str, Any]:
    """Keyword arguments for `cls` from JSON values: lists become tuples, integers become floats where due.

    Strict: an unknown or missing key, and a key that states its default, raise InvalidInputError. So there is
    one dict for one instance.
    """
    if not isinstance(values, dict):
        refuse(prefix.rstrip(".") or "(top level)", "an object", values)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise InvalidInputError(f"model config: unknown key {prefix + str(key)!r}")
    found = {}
    for key, f in fields.items():
        if key in values:
            found[key] = _from_json(values[key], str(f.type))
            if has_default(f) and found[key] == f.default and type(found[key]) is type(f.default):
                raise InvalidInputError(
                    f"model config: key {prefix + key!r} states its default, leave it out"
                )
        elif not has_default(f):
            raise InvalidInputError(f"model config: missing key {prefix + key!r}")
    return found


def has_default(f: Any) -> bool:
    return f.default is not dataclasses.MISSING


def to_json(instance: Any) -> dict[str, Any]:
    """The fields of a checked dataclass, in order, without those that have their default."""
    values = {}
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        if not (has_default(f) and value == f.default):
            values[f.name] = list(value) if type(value) is tuple else value
    return values


def refuse(key: str, expected: str, got: Any) -> NoReturn:
    text = repr(got)
    shown = text if len(text) <= 80 else text[:77] + "..."
    raise InvalidInputError(f"model config: {key} must be {expected}, got {shown}")


def _from_json(value: Any, annotation: str) -> Any:
    if type(value) is list:
        return tuple(value)
    if type(value) is int and "float" in annotation:
        return _to_float(value)
    return value


def _to_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
