"""Reads a checkpoint's config.json key by key: each with its type and "required" or a documented default.

Remembers which keys were read, so that a family can say what it did not use.
"""

from typing import Any, NoReturn

from kttools_runtime.errors import InvalidInputError, UnsupportedModelError

REQUIRED: Any = object()


class ConfigReader:
    """`where` (a path) opens every message; `prefix` names the object inside the file."""

    def __init__(self, values: dict[str, Any], where: str, prefix: str = "") -> None:
        self.values = values
        self.where = where
        self.prefix = prefix
        self.used: set[str] = set()

    def integer(self, key: str, default: Any = REQUIRED) -> int:
        return self._typed(key, default, (int,), "an integer")

    def optional_integer(self, key: str, default: Any = None) -> int | None:
        """null is a value of its own here, as in q_lora_rank."""
        return self._typed(key, default, (int, type(None)), "an integer or null")

    def number(self, key: str, default: Any = REQUIRED) -> float:
        return _as_float(self._typed(key, default, (int, float), "a number"))

    def optional_number(self, key: str) -> float | None:
        value = self._typed(key, None, (int, float, type(None)), "a number or null")
        return None if value is None else _as_float(value)

    def boolean(self, key: str, default: Any = REQUIRED) -> bool:
        return self._typed(key, default, (bool,), "true or false")

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers; () when absent or null."""
        value = self._typed(key, None, (list, type(None)), "a list of integers or null") or []
        if not all(type(item) is int for item in value):
            self.wrong(key, "a list of integers or null", value)
        return tuple(value)

    def texts(self, key: str) -> tuple[str, ...] | None:
        """A list of strings; None when absent or null."""
        value = self._typed(key, None, (list, type(None)), "a list of strings or null")
        if value is not None and not all(type(item) is str for item in value):
            self.wrong(key, "a list of strings or null", value)
        return None if value is None else tuple(value)

    def text(self, key: str, default: Any = REQUIRED) -> str:
        return self._typed(key, default, (str,), "a string")

    def child(self, key: str) -> "ConfigReader | None":
        """The object under `key`, or None when absent or null."""
        value = self._typed(key, None, (dict, type(None)), "an object or null")
        return None if value is None else ConfigReader(value, self.where, f"{self.prefix}{key}.")

    def only(self, key: str, default: str, supported: tuple[str, ...]) -> str:
        """A choice of which we support some values; raises UnsupportedModelError on another."""
        value = self.text(key, default)
        if value not in supported:
            self.unsupported(key, value, f"this version runs only {' or '.join(supported)}")
        return value

    def unused(self) -> list[str]:
        return sorted(key for key in self.values if key not in self.used)

    def wrong(self, key: str, expected: str, got: Any) -> NoReturn:
        raise InvalidInputError(f"{self.where}: {self.prefix}{key} must be {expected}, got {got!r:.80}")

    def unsupported(self, key: str, value: Any, reason: str) -> NoReturn:
        raise UnsupportedModelError(
            f"{self.where}: {self.prefix}{key} {value!r:.80} is not supported: {reason}"
        )

    def _typed(self, key: str, default: Any, types: tuple[type, ...], expected: str) -> Any:
        self.used.add(key)
        if key not in self.values:
            if default is REQUIRED:
                raise InvalidInputError(
                    f"{self.where}: required key {self.prefix}{key} is missing ({expected})"
                )
            return default
        value = self.values[key]
        if type(value) not in types:
            self.wrong(key, expected, value)
        return value


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")
