"""One GGUF file, read as hostile input: header, metadata and tensor table, checked before data is read.

Format (version 2 and 3, little-endian): magic "GGUF", u32 version, u64 tensor count, u64 pair count, the
pairs, the tensor table (name, dimensions with the fastest first, type, offset), padding to the alignment, and
the tensors' data, each padded likewise. Sizes are recomputed from type and shape; no count, length, dimension
or offset of the file is believed before it is held against the file's length.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from .cursor import Cursor
from .metadata import MAX_PAIRS, Metadata, read_metadata, read_string
from .types import TYPES, GgmlType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 1 << 20
MAX_NAME_BYTES = 64
MAX_DIMENSIONS = 4
MAX_COUNT = 2**63 - 1
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
SMALLEST_PAIR_BYTES = 8 + 4 + 1
SMALLEST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor. shape: slowest dimension first (as NumPy and torch); offset: absolute byte offset."""

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    bytes: int
    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A checked header; tensors in the order of their data."""

    file: Path
    file_bytes: int
    version: int
    metadata: Metadata
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: str | Path) -> GgufHeader:
    """A checked header. Raises InvalidInputError (not readable) or CorruptFileError (a rule is broken)."""
    with Cursor(Path(path), MAX_HEADER_BYTES) as cursor:
        version = _read_version(cursor)
        tensor_count, pair_count = cursor.integer(8), cursor.integer(8)
        _check_count(cursor, "tensors", tensor_count, MAX_TENSORS, SMALLEST_TENSOR_BYTES)
        _check_count(cursor, "key-value pairs", pair_count, MAX_PAIRS, SMALLEST_PAIR_BYTES)
        metadata = Metadata(str(cursor.file), read_metadata(cursor, pair_count))
        alignment = _alignment(cursor, metadata)
        tensors = [_read_tensor(cursor) for _ in range(tensor_count)]
        placed = _place(cursor, tensors, alignment)
        return GgufHeader(cursor.file, cursor.file_bytes, version, metadata, placed)


def aligned(position: int, alignment: int) -> int:
    """The next multiple of alignment."""
    return -(-position // alignment) * alignment


def _read_version(cursor: Cursor) -> int:
    if cursor.file_bytes < 24:
        cursor.corrupt(f"{cursor.file_bytes} bytes, expected at least 24: no GGUF file")
    magic = cursor.take(4)
    if magic != MAGIC:
        cursor.corrupt(f"expected {MAGIC!r}, got {magic!r}: no GGUF file")
    version = cursor.integer(4)
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
        hint = ": a big-endian file, which is not read" if swapped else ", expected 2 or 3"
        cursor.corrupt(f"GGUF version {version}{hint}")
    return version


def _check_count(cursor: Cursor, what: str, count: int, most: int, smallest_bytes: int) -> None:
    if count > most or count * smallest_bytes > cursor.remaining:
        possible = min(most, cursor.remaining // smallest_bytes)
        cursor.corrupt(f"{count} {what}, at most {possible} possible in this file")


def _alignment(cursor: Cursor, metadata: Metadata) -> int:
    value = metadata.values.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    is_power = type(value) is int and 1 <= value <= MAX_ALIGNMENT and value & (value - 1) == 0
    if type(value) is not int or not is_power:
        cursor.corrupt(f"{ALIGNMENT_KEY} must be a power of two up to {MAX_ALIGNMENT}, got {value!r:.80}")
    return value


def _read_tensor(cursor: Cursor) -> GgufTensor:
    """A line of the table; offset is still relative to the data."""
    name = read_string(cursor, MAX_NAME_BYTES, "tensor name")
    where = f"tensor {name!r}"
    count = cursor.integer(4)
    if not 1 <= count <= MAX_DIMENSIONS:
        cursor.corrupt(f"{where}: {count} dimensions, expected 1 to {MAX_DIMENSIONS}")
    dimensions = [cursor.integer(8) for _ in range(count)]
    number, offset = cursor.integer(4), cursor.integer(8)
    kind = TYPES.get(number)
    if kind is None:
        cursor.corrupt(f"{where}: unknown ggml type {number}")
    if not all(1 <= size <= MAX_COUNT for size in dimensions):
        cursor.corrupt(f"{where}: dimensions {dimensions} must be at least 1 and below 2^63")
    row_bytes = kind.row_bytes(dimensions[0])
    if row_bytes is None:
        expected = f"rows of a multiple of {kind.block} weights"
        cursor.corrupt(f"{where}: {kind.name} needs {expected}, got {dimensions[0]}")
    total = math.prod(dimensions[1:]) * row_bytes
    if total > cursor.file_bytes:
        got = f"{kind.name} {dimensions} is {total} bytes"
        cursor.corrupt(f"{where}: {got}, the file has {cursor.file_bytes}")
    return GgufTensor(name, kind, tuple(reversed(dimensions)), total, cursor.file, offset)


def _place(cursor: Cursor, tensors: list[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
    """Absolute offsets; data must follow in one sequence, padded to the alignment, up to the file's end."""
    start = position = aligned(cursor.position, alignment) if tensors else cursor.position
    placed: dict[str, GgufTensor] = {}
    end = position
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        where = f"tensor {tensor.name!r}"
        if tensor.name in placed:
            cursor.corrupt(f"duplicate {where}")
        if tensor.offset + start != position:
            kind = "overlaps" if tensor.offset + start < position else "leaves a hole behind"
            got = f"data at offset {tensor.offset}, expected {position - start}"
            cursor.corrupt(f"{where} {kind} the tensor before it: {got}")
        placed[tensor.name] = GgufTensor(
            tensor.name, tensor.kind, tensor.shape, tensor.bytes, tensor.file, position
        )
        end = position + tensor.bytes
        position = aligned(end, alignment)
    if not end <= cursor.file_bytes <= max(position, aligned(end, DEFAULT_ALIGNMENT)):
        kind = "truncated" if cursor.file_bytes < end else "bytes that belong to no tensor"
        cursor.corrupt(f"data ends at byte {end}, the file at {cursor.file_bytes} ({kind})")
    return placed
