"""GGUF key-value pairs and the tensor table as bytes."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kttools.checkpoint.gguf.types import GgmlType

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Typed:
    """A value with its GGUF type: one of KINDS, "string", or "array of " and one of these."""

    kind: str
    value: int | float | bool | str | Sequence[int | float | str]


# name -> (GGUF value type, struct format)
KINDS: dict[str, tuple[int, str]] = {
    "u8": (0, "<B"),
    "u16": (2, "<H"),
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
}
STRING, ARRAY = 8, 9
ARRAY_PREFIX = "array of "


def typed(value: int | float | bool | str) -> Typed:
    """The type llama.cpp expects of such a value: u32, f32, bool or string."""
    kinds = {bool: "bool", int: "u32", float: "f32", str: "string"}
    return Typed(kinds[type(value)], value)


def pair_bytes(key: str, entry: Typed) -> bytes:
    """One key, type and value."""
    if not entry.kind.startswith(ARRAY_PREFIX):
        return text_bytes(key) + _number(_type_of(entry.kind)) + _scalar(entry.kind, entry.value)
    kind = entry.kind.removeprefix(ARRAY_PREFIX)
    values = list(entry.value)  # type: ignore[arg-type]
    head = text_bytes(key) + _number(ARRAY) + _number(_type_of(kind)) + struct.pack("<Q", len(values))
    return head + b"".join(_scalar(kind, value) for value in values)


def tensor_bytes(name: str, kind: GgmlType, shape: tuple[int, ...], offset: int) -> bytes:
    """One line of the tensor table. shape: slowest dimension first; offset: from the start of the data."""
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text_bytes(name) + dimensions + struct.pack("<IQ", kind.number, offset)


def head_bytes(tensors: int, pairs: int) -> bytes:
    return MAGIC + struct.pack("<IQQ", VERSION, tensors, pairs)


def text_bytes(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def padding(position: int) -> bytes:
    """Zeros up to the next aligned position."""
    return bytes(-position % ALIGNMENT)


def _type_of(kind: str) -> int:
    return STRING if kind == "string" else KINDS[kind][0]


def _number(value: int) -> bytes:
    return struct.pack("<I", value)


def _scalar(kind: str, value: object) -> bytes:
    return text_bytes(str(value)) if kind == "string" else struct.pack(KINDS[kind][1], value)
