"""The expert pack: the routed experts of one MoE layer in one file, mapped and used in place.

The format is PACK.md beside this file; `validate` holds its rules for reader and writer alike. Headers are
hostile: sizes are bounded before anything is read or allocated, and the checksum is tested before any other
field is believed.
"""

import contextlib
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NoReturn

import numpy as np
import xxhash

from . import _kernels
from .errors import InvalidInputError, PackFormatError
from .huge_pages import ask_for_huge_pages
from .weights import check_sum_inputs

MAGIC = b"KTEXPERT"
VERSION = 1
LAYOUT = 1
PAGE_BYTES = 4096
MAX_EXPERTS = 1 << 16
MAX_SIZE = 1 << 20
MAX_LAYER = (1 << 16) - 1
BLOCK_BYTES = 4 << 20

# (name, struct code) in file order; PACK.md's tables are held against these.
HEADER_FIELDS = (
    ("magic", "8s"),
    ("version", "I"),
    ("header_bytes", "I"),
    ("layout", "I"),
    ("num_experts", "I"),
    ("hidden_size", "I"),
    ("moe_intermediate_size", "I"),
    ("layer", "I"),
    ("reserved_1", "I"),
    ("file_bytes", "Q"),
    ("header_xxh3_64", "Q"),
    ("reserved_2", "Q"),
)
EXPERT_FIELDS = (("format", "I"), ("reserved", "I"), ("offset", "Q"), ("bytes", "Q"), ("xxh3_64", "Q"))
HEADER = struct.Struct("<" + "".join(code for _, code in HEADER_FIELDS))
EXPERT = struct.Struct("<" + "".join(code for _, code in EXPERT_FIELDS))
CHECKSUM_OFFSET = 48


class Rule(str, Enum):
    """Every way a file can fail to be a pack: the closed list of PACK.md."""

    TRUNCATED = "truncated"
    MAGIC = "magic"
    VERSION = "version"
    LIMITS = "limits"
    HEADER_BYTES = "header_bytes"
    HEADER_CHECKSUM = "header_checksum"
    RESERVED = "reserved"
    LAYOUT = "layout"
    FORMAT = "format"
    BLOB_BYTES = "blob_bytes"
    OFFSET = "offset"
    FILE_BYTES = "file_bytes"
    FILE_LENGTH = "file_length"
    BLOB_CHECKSUM = "blob_checksum"


class BrokenRule(PackFormatError):
    """A PackFormatError that says which rule of PACK.md is broken."""

    def __init__(self, rule: Rule, where: object, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.rule = rule


@dataclass(frozen=True, slots=True)
class PackedExpert:
    """One entry of the expert table. format: its id; offset: from the start of the file."""

    format: int
    offset: int
    bytes: int
    xxh3_64: int


@dataclass(frozen=True, slots=True)
class PackHeader:
    """What a pack says about itself; experts in the order of their ids."""

    header_bytes: int
    layout: int
    num_experts: int
    hidden_size: int
    moe_intermediate_size: int
    layer: int
    file_bytes: int
    experts: tuple[PackedExpert, ...]

    @property
    def formats(self) -> tuple[str, ...]:
        """Format name of each expert."""
        names = format_names()
        return tuple(names[expert.format] for expert in self.experts)


def format_names() -> dict[int, str]:
    """Format id -> name, as the kernels know them."""
    return {number: name for name, number in {**_kernels.FORMATS, **_kernels.BLOCK_FORMATS}.items()}


def header_size(num_experts: int) -> int:
    """Bytes before the first blob: the fixed part, the table, zeros up to a page."""
    return -(-(HEADER.size + EXPERT.size * num_experts) // PAGE_BYTES) * PAGE_BYTES


def validate(header: PackHeader, where: object) -> None:
    """Every rule that the fields alone can break. Raises BrokenRule naming `where`, expected and got."""
    _check_limits(header, where)
    if header.layout != LAYOUT:
        _broken(Rule.LAYOUT, where, f"layout {header.layout}, this program reads layout {LAYOUT}")
    if header.header_bytes != header_size(header.num_experts):
        expected = f"{header_size(header.num_experts)} for {header.num_experts} experts"
        _broken(Rule.HEADER_BYTES, where, f"header of {header.header_bytes} bytes, expected {expected}")
    end = _check_experts(header, where)
    if header.file_bytes != end:
        problem = f"file_bytes is {header.file_bytes}, the last expert ends at {end}"
        _broken(Rule.FILE_BYTES, where, problem)
    _check_sums(header, where)


def parse_header(data: bytes, where: object) -> PackHeader:
    """The whole header [0, header_bytes) -> a valid PackHeader. Raises BrokenRule."""
    _check_fixed_part(data, where)
    fields = dict(zip((name for name, _ in HEADER_FIELDS), HEADER.unpack_from(data), strict=True))
    if len(data) < fields["header_bytes"]:
        problem = f"{len(data)} bytes, the header alone has {fields['header_bytes']}"
        _broken(Rule.TRUNCATED, where, problem)
    if len(data) != fields["header_bytes"]:
        raise ValueError(f"got {len(data)} bytes for a header of {fields['header_bytes']}")
    if header_checksum(data) != fields["header_xxh3_64"]:
        _broken(Rule.HEADER_CHECKSUM, where, "the header does not match its checksum; it is damaged")
    header = PackHeader(
        fields["header_bytes"],
        fields["layout"],
        fields["num_experts"],
        fields["hidden_size"],
        fields["moe_intermediate_size"],
        fields["layer"],
        fields["file_bytes"],
        _parse_experts(data, fields["num_experts"], where),
    )
    table_end = HEADER.size + EXPERT.size * header.num_experts
    if fields["reserved_1"] or fields["reserved_2"] or data.count(0, table_end) != len(data) - table_end:
        _broken(Rule.RESERVED, where, "reserved bytes of the header are not zero")
    validate(header, where)
    return header


def header_bytes(header: PackHeader) -> bytes:
    """The header as it stands in the file, checksum included. Raises BrokenRule for an invalid header."""
    validate(header, "pack header")
    data = bytearray(header.header_bytes)
    sizes = (header.num_experts, header.hidden_size, header.moe_intermediate_size, header.layer)
    HEADER.pack_into(
        data, 0, MAGIC, VERSION, header.header_bytes, header.layout, *sizes, 0, header.file_bytes, 0, 0
    )
    for index, expert in enumerate(header.experts):
        entry = (expert.format, 0, expert.offset, expert.bytes, expert.xxh3_64)
        EXPERT.pack_into(data, HEADER.size + index * EXPERT.size, *entry)
    data[CHECKSUM_OFFSET : CHECKSUM_OFFSET + 8] = header_checksum(data).to_bytes(8, "little")
    return bytes(data)


def header_checksum(data: bytes | bytearray) -> int:
    """XXH3-64 of the header with the checksum's own eight bytes as zeros."""
    digest = xxhash.xxh3_64()
    digest.update(data[:CHECKSUM_OFFSET])
    digest.update(bytes(8))
    digest.update(data[CHECKSUM_OFFSET + 8 :])
    return digest.intdigest()


def read_pack_header(path: str | Path) -> PackHeader:
    """The checked header of a pack; blobs are not read.

    Raises InvalidInputError (no readable file) or BrokenRule, a PackFormatError.
    """
    with _opened(Path(path)) as descriptor:
        return _read_header(descriptor, path)


def map_pack(path: str | Path) -> tuple[PackHeader, list[np.ndarray]]:
    """The header and each expert's blob: read-only uint8 views, page-aligned, into one mapping of the file.

    Nothing is read from disk yet. The mapping lives as long as a view does; the file must not be truncated
    meanwhile (it never is by us: packs are replaced, not rewritten). Raises as read_pack_header.
    """
    with _opened(Path(path)) as descriptor:
        header = _read_header(descriptor, path)
        mapping = mmap.mmap(descriptor, header.file_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        ask_for_huge_pages(mapping)
    whole = np.frombuffer(mapping, dtype=np.uint8)
    return header, [whole[expert.offset : expert.offset + expert.bytes] for expert in header.experts]


def verify_pack(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> PackHeader:
    """Reads every blob and compares its checksum. on_bytes: called with the size of each block read.

    Raises as read_pack_header.
    """
    with _opened(Path(path)) as descriptor:
        header = _read_header(descriptor, path)
        for index, expert in enumerate(header.experts):
            got = _blob_checksum(descriptor, expert, path, on_bytes)
            if got != expert.xxh3_64:
                expected = f"expected {expert.xxh3_64:016x}, got {got:016x}"
                _broken(Rule.BLOB_CHECKSUM, path, f"expert {index}: checksum {expected}; it is damaged")
    return header


def _check_limits(header: PackHeader, where: object) -> None:
    limits = (
        ("num_experts", header.num_experts, 1, MAX_EXPERTS),
        ("hidden_size", header.hidden_size, 1, MAX_SIZE),
        ("moe_intermediate_size", header.moe_intermediate_size, 1, MAX_SIZE),
        ("layer", header.layer, 0, MAX_LAYER),
    )
    for name, value, low, high in limits:
        if not low <= value <= high:
            _broken(Rule.LIMITS, where, f"{name} is {value}, expected {low} to {high}")
    if len(header.experts) != header.num_experts:
        problem = f"num_experts is {header.num_experts}, the table has {len(header.experts)}"
        _broken(Rule.LIMITS, where, problem)


def _check_sums(header: PackHeader, where: object) -> None:
    """Sizes that every format can hold, but int32 sums cannot."""
    names = format_names()
    for number in {expert.format for expert in header.experts}:
        for field in ("hidden_size", "moe_intermediate_size"):
            try:
                check_sum_inputs(field, names.get(number, ""), getattr(header, field))
            except InvalidInputError as error:
                _broken(Rule.LIMITS, where, str(error))


def _check_experts(header: PackHeader, where: object) -> int:
    """The table: known formats, exact sizes, no hole and no overlap. Returns the end of the last blob."""
    names = format_names()
    sizes: dict[int, int] = {}
    end = header.header_bytes
    for index, expert in enumerate(header.experts):
        if expert.format not in names:
            known = ", ".join(f"{number} {name}" for number, name in names.items())
            problem = f"expert {index}: unknown format {expert.format}, expected one of {known}"
            _broken(Rule.FORMAT, where, problem)
        if expert.format not in sizes:
            shape = (header.hidden_size, header.moe_intermediate_size)
            try:
                sizes[expert.format] = _kernels.expert_bytes(names[expert.format], *shape)
            except ValueError as error:
                _broken(Rule.FORMAT, where, f"expert {index}: {error}")
        if expert.bytes != sizes[expert.format]:
            problem = f"expert {index}: {expert.bytes} bytes, expected {sizes[expert.format]} of its format"
            _broken(Rule.BLOB_BYTES, where, problem)
        if expert.offset != end:
            problem = f"expert {index} begins at {expert.offset}, expected {end}: blobs touch, in order"
            _broken(Rule.OFFSET, where, problem)
        end += expert.bytes
    return end


def _check_fixed_part(data: bytes, where: object) -> None:
    """What must hold before the rest of the header may be read: it bounds header_bytes."""
    if len(data) < HEADER.size:
        _broken(Rule.TRUNCATED, where, f"{len(data)} bytes, expected at least {HEADER.size}: not a pack")
    if data[: len(MAGIC)] != MAGIC:
        _broken(Rule.MAGIC, where, f"begins with {data[: len(MAGIC)]!r}, expected {MAGIC!r}: not a pack")
    version, size, _, num_experts = struct.unpack_from("<4I", data, 8)
    if version != VERSION:
        _broken(Rule.VERSION, where, f"pack version {version}, this program reads version {VERSION}")
    if not 1 <= num_experts <= MAX_EXPERTS:
        _broken(Rule.LIMITS, where, f"num_experts is {num_experts}, expected 1 to {MAX_EXPERTS}")
    if size != header_size(num_experts):
        expected = f"{header_size(num_experts)} for {num_experts} experts"
        _broken(Rule.HEADER_BYTES, where, f"header of {size} bytes, expected {expected}")


def _parse_experts(data: bytes, num_experts: int, where: object) -> tuple[PackedExpert, ...]:
    table = data[HEADER.size : HEADER.size + EXPERT.size * num_experts]
    experts = []
    for index, (number, reserved, *rest) in enumerate(EXPERT.iter_unpack(table)):
        if reserved:
            _broken(Rule.RESERVED, where, f"expert {index}: reserved is {reserved}, expected 0")
        experts.append(PackedExpert(number, *rest))
    return tuple(experts)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file; a pipe or device is refused without blocking."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidInputError(f"{path}: not a regular file")
        yield descriptor
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _read_header(descriptor: int, where: object) -> PackHeader:
    data = os.pread(descriptor, HEADER.size, 0)
    _check_fixed_part(data, where)
    size = int.from_bytes(data[12:16], "little")
    header = parse_header(os.pread(descriptor, size, 0), where)
    length = os.fstat(descriptor).st_size
    if length != header.file_bytes:
        kind = "truncated" if length < header.file_bytes else "longer than it says"
        _broken(Rule.FILE_LENGTH, where, f"{length} bytes, expected {header.file_bytes}: {kind}")
    return header


def _blob_checksum(
    descriptor: int, expert: PackedExpert, where: object, on_bytes: Callable[[int], object] | None
) -> int:
    digest = xxhash.xxh3_64()
    block = memoryview(bytearray(min(BLOCK_BYTES, expert.bytes)))
    position, end = expert.offset, expert.offset + expert.bytes
    while position < end:
        count = os.preadv(descriptor, [block[: end - position]], position)
        if count == 0:
            _broken(Rule.FILE_LENGTH, where, f"truncated at byte {position} while it was read")
        digest.update(block[:count])
        position += count
        if on_bytes:
            on_bytes(count)
    return digest.intdigest()


def _broken(rule: Rule, where: object, problem: str) -> NoReturn:
    raise BrokenRule(rule, where, problem)
