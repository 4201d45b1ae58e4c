"""JSON as hostile input: no duplicate keys, no NaN or infinity, bounded nesting; and one canonical form.

Used for every JSON file this project reads from a model: config.json, safetensors headers and indexes, and
the bundle's manifest.
"""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from .errors import CorruptFileError, InvalidInputError

# Two models of 70,000 tensors need 10 MB; a config 10 KB. Larger is an attack or a mistake.
MAX_JSON_BYTES = 100_000_000


class _Refused(ValueError):
    """A construct the standard parser accepts and we do not."""


def parse(data: bytes, where: str) -> Any:
    """Parses one JSON document; `where` (a path, or a path and a part) opens every message.

    Raises CorruptFileError on bad UTF-8 or JSON, duplicate keys, NaN or infinite numbers, and absurd nesting.
    """
    if len(data) > MAX_JSON_BYTES:
        raise CorruptFileError(f"{where}: {len(data)} bytes of JSON, expected at most {MAX_JSON_BYTES}")
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_pairs,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{where}: not UTF-8 at byte {error.start}") from None
    except _Refused as error:
        raise CorruptFileError(f"{where}: {error}") from None
    except RecursionError:
        raise CorruptFileError(f"{where}: JSON is nested too deeply") from None
    except ValueError as error:
        raise CorruptFileError(f"{where}: not valid JSON: {error}") from None


def canonical(value: Any) -> bytes:
    """The one byte form of a document: ASCII, sorted keys, one space of indent, a newline at the end."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON file whose top level is an object. Raises InvalidInputError when it cannot be read."""
    data = read_bounded(path, max_bytes)
    value = parse(data, str(path))
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """A small regular file. Raises InvalidInputError (missing, a device) or CorruptFileError (too big)."""
    try:
        if not path.is_file():
            raise InvalidInputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise CorruptFileError(f"{path}: larger than the {max_bytes} bytes such a file may have")
    return data


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Refused(f"duplicate key {key[:200]!r}")
        result[key] = value
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise _Refused(f"number {text} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"number {text[:40]} does not fit a float")
    return value
