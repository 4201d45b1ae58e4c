"""One safetensors file, read as hostile input: header checks and bounded reads of single tensors.

Format: u64 little-endian header length, the header (JSON: name -> dtype, shape, data_offsets; optional
__metadata__ of strings), then the data. Refused: a header over 100 MB or beyond the file, duplicate keys,
numbers that are not plain non-negative integers, shape x dtype != bytes, and any hole, overlap or trailing
byte in the data. The whole header is checked before any tensor is read; reads go through pread into memory
of their own, so RSS holds one tensor, never a mapping of the file.
"""

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import strict_json
from .errors import CorruptFileError, InvalidInputError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
MAX_COUNT = 2**63 - 1
LENGTH_BYTES = 8

# dtype name in the header -> (bytes per element, torch dtype; None: known for inspection, not readable)
DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BF16": (2, torch.bfloat16),
    "F16": (2, torch.float16),
    "F32": (4, torch.float32),
    "F64": (8, torch.float64),
    "F8_E4M3": (1, torch.float8_e4m3fn),
    "F8_E5M2": (1, torch.float8_e5m2),
    "F8_E8M0": (1, None),
    "BOOL": (1, None),
    "I8": (1, torch.int8),
    "U8": (1, torch.uint8),
    "I16": (2, torch.int16),
    "U16": (2, torch.uint16),
    "I32": (4, torch.int32),
    "U32": (4, torch.uint32),
    "I64": (8, torch.int64),
    "U64": (8, torch.uint64),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. offset: absolute byte offset in `file`; shape as stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A checked header: tensors by name in the order of their data, and the file's metadata strings."""

    file: Path
    file_bytes: int
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | Path) -> SafetensorsHeader:
    """A checked header. Raises InvalidInputError (not readable) or CorruptFileError (rule broken)."""
    file = Path(path)
    try:
        with _Opened(file) as opened:
            data = _header_bytes(opened)
            return parse_header(data, file, opened.bytes)
    except OSError as error:
        raise InvalidInputError(f"{file}: cannot be read: {error.strerror}") from None


def parse_header(data: bytes, file: Path, file_bytes: int) -> SafetensorsHeader:
    """Checks the JSON part of a header against the file's length. Raises CorruptFileError."""
    where = f"{file}: header"
    if data[:1] != b"{":
        _corrupt(file, f"header must start with '{{', got {data[:1]!r}")
    entries = strict_json.parse(data, where)
    metadata = _metadata(file, entries.pop("__metadata__", {}))
    data_start = LENGTH_BYTES + len(data)
    infos = [_tensor_info(file, name, entry, data_start) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.bytes))
    _check_contiguous(file, infos, data_start, file_bytes)
    return SafetensorsHeader(file, file_bytes, {info.name: info for info in infos}, metadata)


def read_tensor(info: TensorInfo, index: int | None = None) -> torch.Tensor:
    """The tensor, or its slice [index] of the leading dimension, in fresh memory.

    Raises InvalidInputError on a dtype that cannot be read and CorruptFileError when the file has shrunk.
    """
    dtype = DTYPES[info.dtype][1]
    if dtype is None:
        raise InvalidInputError(f"{info.file}: tensor {info.name}: dtype {info.dtype} cannot be read")
    shape, offset, count = info.shape, info.offset, info.bytes
    if index is not None:
        if not info.shape or not 0 <= index < info.shape[0]:
            raise IndexError(f"tensor {info.name} of shape {list(info.shape)} has no slice {index}")
        shape, count = info.shape[1:], info.bytes // info.shape[0]
        offset += index * count
    buffer = torch.empty(count, dtype=torch.uint8)
    _read_into(info.file, offset, buffer)
    return buffer.view(dtype).view(shape)


class _Opened:
    """A regular file open for reading, as a context manager; refuses pipes and devices without blocking."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> "_Opened":
        self.descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(self.descriptor)
            raise InvalidInputError(f"{self.file}: not a regular file")
        self.bytes = status.st_size
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            if count == 0:
                _corrupt(self.file, f"truncated at byte {offset + done}, expected {len(buffer) - done} more")
            done += count


def _read_into(file: Path, offset: int, buffer: torch.Tensor) -> None:
    if not buffer.numel():
        return
    try:
        with _Opened(file) as opened:
            opened.read_into(offset, buffer.numpy().data)
    except OSError as error:
        raise InvalidInputError(f"{file}: cannot be read: {error.strerror}") from None


def _header_bytes(opened: _Opened) -> bytes:
    if opened.bytes < LENGTH_BYTES:
        _corrupt(opened.file, f"{opened.bytes} bytes, expected at least {LENGTH_BYTES}: no safetensors file")
    length_field = bytearray(LENGTH_BYTES)
    opened.read_into(0, memoryview(length_field))
    length = int.from_bytes(length_field, "little")
    if length > MAX_HEADER_BYTES:
        _corrupt(opened.file, f"header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
    if length < 2 or length > opened.bytes - LENGTH_BYTES:
        _corrupt(opened.file, f"header of {length} bytes in a file of {opened.bytes} bytes")
    header = bytearray(length)
    opened.read_into(LENGTH_BYTES, memoryview(header))
    return bytes(header)


def _metadata(file: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        _corrupt(file, "__metadata__ must be an object of strings")
    return value


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _corrupt(file, f"{where}: expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _corrupt(file, f"{where}: unknown dtype {dtype!r:.80}, expected one of {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        expected_shape = f"at most {MAX_DIMENSIONS} non-negative integers"
        _corrupt(file, f"{where}: shape must be {expected_shape}, got {shape!r:.80}")
    if not _are_counts(offsets) or len(offsets) != 2:
        _corrupt(file, f"{where}: data_offsets must be two non-negative integers, got {offsets!r:.80}")
    begin, end = offsets
    if begin > end:
        _corrupt(file, f"{where}: data_offsets begin {begin} is beyond end {end}")
    expected = _byte_count(file, where, shape, DTYPES[dtype][0])
    if expected != end - begin:
        _corrupt(file, f"{where}: {dtype} {shape} is {expected} bytes, data_offsets span {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), expected, file, data_start + begin)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(item) is int and 0 <= item <= MAX_COUNT for item in values)


def _byte_count(file: Path, where: str, shape: list[int], item_bytes: int) -> int:
    """Product in bounded steps; zero dimensions are counted last so that they cannot hide an absurd one."""
    total = item_bytes
    for size in shape:
        total *= max(size, 1)
        if total > MAX_COUNT:
            _corrupt(file, f"{where}: shape {shape!r:.80} overflows 63 bits")
    return total if math.prod(min(size, 1) for size in shape) else 0


def _check_contiguous(file: Path, infos: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    position = data_start
    for info in infos:
        if info.offset != position:
            kind = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            got = f"data begins at {info.offset - data_start}, expected {position - data_start}"
            _corrupt(file, f"tensor {info.name[:200]!r} {kind}: {got}")
        position += info.bytes
    if position != file_bytes:
        kind = "truncated" if position > file_bytes else "bytes that belong to no tensor"
        _corrupt(file, f"data ends at byte {position}, the file at {file_bytes} ({kind})")


def _corrupt(file: Path, problem: str) -> NoReturn:
    raise CorruptFileError(f"{file}: {problem}")
