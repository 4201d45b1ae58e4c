"""GGUF's typed key-value pairs, read as hostile input. See docs/gguf.md for the rules."""

from typing import Any, NoReturn

import numpy as np

from kttools_runtime.errors import InvalidInputError

from .cursor import Cursor

MAX_PAIRS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1
MAX_STRING_BYTES = 16 << 20
MAX_ARRAY_LENGTH = 1 << 21
BOOL, STRING, ARRAY = 7, 8, 9
LENGTH_BYTES = 8

# GGUF value type -> NumPy dtype of one little-endian number
NUMBERS: dict[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}

Value = int | float | bool | str | list[str] | np.ndarray


class Metadata:
    """The pairs of a GGUF file with typed getters that name file and key when a value is not what it must be.

    Numbers keep their width's meaning: a float32 is given as the shortest decimal that has its value, so that
    1e-6 written as float32 reads as 1e-6.
    """

    def __init__(self, where: str, values: dict[str, Value]) -> None:
        self.where = where
        self.values = values

    def __contains__(self, key: object) -> bool:
        return key in self.values

    def integer(self, key: str, default: Any = ...) -> Any:
        return self._typed(key, default, (int,), "an integer")

    def number(self, key: str, default: Any = ...) -> Any:
        value = self._typed(key, default, (int, float), "a number")
        return float(value) if type(value) is int else value

    def boolean(self, key: str, default: Any = ...) -> Any:
        return self._typed(key, default, (bool,), "true or false")

    def text(self, key: str, default: Any = ...) -> Any:
        return self._typed(key, default, (str,), "a string")

    def texts(self, key: str, default: Any = ...) -> Any:
        return self._typed(key, default, (list,), "an array of strings")

    def integers(self, key: str, default: Any = ...) -> Any:
        """A NumPy array of integers."""
        value = self._typed(key, default, (np.ndarray,), "an array of integers")
        if isinstance(value, np.ndarray) and value.dtype.kind not in "iu":
            self._wrong(key, "an array of integers", value.dtype)
        return value

    def numbers(self, key: str, default: Any = ...) -> Any:
        """A NumPy array of numbers, all of them finite."""
        value = self._typed(key, default, (np.ndarray,), "an array of numbers")
        if isinstance(value, np.ndarray) and (value.dtype.kind not in "iuf" or not np.isfinite(value).all()):
            self._wrong(key, "an array of finite numbers", value.dtype)
        return value

    def _typed(self, key: str, default: Any, types: tuple[type, ...], expected: str) -> Any:
        if key not in self.values:
            if default is ...:
                raise InvalidInputError(f"{self.where}: required key {key} is missing ({expected})")
            return default
        value = self.values[key]
        if type(value) not in types:
            self._wrong(key, expected, value)
        return value

    def _wrong(self, key: str, expected: str, got: object) -> NoReturn:
        raise InvalidInputError(f"{self.where}: key {key} must be {expected}, got {got!s:.80}")


def read_metadata(cursor: Cursor, count: int) -> dict[str, Value]:
    """`count` pairs from the cursor. Raises CorruptFileError."""
    values: dict[str, Value] = {}
    for _ in range(count):
        key = read_string(cursor, MAX_KEY_BYTES, "key")
        if key in values:
            cursor.corrupt(f"duplicate key {key[:200]!r}")
        values[key] = _read_value(cursor, key)
    return values


def read_string(cursor: Cursor, max_bytes: int, what: str) -> str:
    """A length and UTF-8 bytes."""
    length = cursor.integer(LENGTH_BYTES)
    if length > max_bytes:
        cursor.corrupt(f"{what} of {length} bytes, expected at most {max_bytes}")
    data = cursor.take(length)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        cursor.corrupt(f"{what} is not UTF-8 at its byte {error.start}")


def _read_value(cursor: Cursor, key: str) -> Value:
    kind = cursor.integer(4)
    what = f"value of {key[:200]!r}"
    if kind == ARRAY:
        return _read_array(cursor, what)
    if kind == STRING:
        return read_string(cursor, MAX_STRING_BYTES, what)
    if kind == BOOL:
        return bool(_read_bools(cursor, 1, what)[0])
    if kind not in NUMBERS:
        cursor.corrupt(f"{what}: unknown type {kind}")
    number = _read_numbers(cursor, NUMBERS[kind], 1)[0]
    if number.dtype.kind != "f":
        return int(number)
    if not np.isfinite(number):
        cursor.corrupt(f"{what}: {number} is not a finite number")
    return float(str(number))


def _read_array(cursor: Cursor, what: str) -> Value:
    kind = cursor.integer(4)
    length = cursor.integer(LENGTH_BYTES)
    if kind != STRING and kind != BOOL and kind not in NUMBERS:
        nested = "arrays of arrays are not read" if kind == ARRAY else f"unknown type {kind}"
        cursor.corrupt(f"{what}: array elements: {nested}")
    smallest = LENGTH_BYTES if kind == STRING else np.dtype(NUMBERS.get(kind, "<u1")).itemsize
    if length > MAX_ARRAY_LENGTH or length * smallest > cursor.remaining:
        most = min(MAX_ARRAY_LENGTH, cursor.remaining // smallest)
        cursor.corrupt(f"{what}: array of {length} elements, at most {most} possible here")
    if kind == STRING:
        return [read_string(cursor, MAX_STRING_BYTES, what) for _ in range(length)]
    if kind == BOOL:
        return _read_bools(cursor, length, what)
    return _read_numbers(cursor, NUMBERS[kind], length)


def _read_numbers(cursor: Cursor, dtype: str, length: int) -> np.ndarray:
    return np.frombuffer(cursor.take(np.dtype(dtype).itemsize * length), dtype=dtype)


def _read_bools(cursor: Cursor, length: int, what: str) -> np.ndarray:
    values = _read_numbers(cursor, "<u1", length)
    if (values > 1).any():
        cursor.corrupt(f"{what}: a boolean must be 0 or 1, got {int(values.max())}")
    return values.astype(bool)
