"""What ends every part of an archive: our index and zstd's seek table, built and parsed. docs/archive.md.

A part is zstd frames, then a skippable frame with the index, then a skippable frame with a seek table as
zstd's seekable format has it. One function, check(), holds the rules for writer and reader. All numbers are
little-endian.
"""

import struct
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import xxhash

from kttools_runtime.errors import CorruptFileError, InvalidInputError

from .layout import FRAME_BYTES, Layout, Member
from .names import MAX_NAME_BYTES, names_problem

MAGIC = b"KTARCHIV"
VERSION = 1
INDEX_FRAME_MAGIC = 0x184D2A54
SEEK_FRAME_MAGIC = 0x184D2A5E
SEEK_MAGIC = 0x8F92EAB1
MAX_PARTS = 99_999
MAX_MEMBERS = 65_536
MAX_FRAMES = 1 << 22  # of one part: 4 TiB
MAX_PAYLOAD_BYTES = 1 << 62
# A frame cannot be smaller: magic, header, one block, checksum.
MIN_FRAME_BYTES = 13
# zstd makes noise no larger than this; anything beyond is not what encode_frame writes.
MAX_PACKED_BYTES = FRAME_BYTES + 4096

SKIPPABLE = struct.Struct("<II")  # magic, content bytes
# magic, version, part, parts, members, first_frame, frames, total_frames, bundle_sha256, frame_bytes,
# table_bytes, xxh3_64
HEADER = struct.Struct("<8sIIIIQQQ32sIIQ")
MEMBER = struct.Struct("<QH")  # bytes, name bytes; the name follows
SEEK_ENTRY = struct.Struct("<II")  # compressed bytes, content bytes
FOOTER = struct.Struct("<IBI")  # entries, descriptor, magic
CHECKSUM_BYTES = 8


@dataclass(frozen=True, slots=True)
class PartIndex:
    """The index of one part.

    part: from 1. first_frame: number of its first frame in the archive. bundle_sha256: of bundle.json, the
    archive's identity. packed_bytes, xxh3_64: of each frame, compressed size and hash of the content.
    """

    part: int
    parts: int
    bundle_sha256: bytes
    members: tuple[Member, ...]
    first_frame: int
    packed_bytes: np.ndarray
    xxh3_64: np.ndarray

    @property
    def num_frames(self) -> int:
        return len(self.packed_bytes)


def trailer_bytes(num_frames: int, members: tuple[Member, ...]) -> int:
    """Size of index and seek table of a part with so many frames."""
    return _index_bytes(num_frames, _table_bytes(members)) + _seek_bytes(num_frames + 1)


def build_trailer(index: PartIndex) -> bytes:
    """Index and seek table. Raises CorruptFileError where the reader would."""
    layout = Layout(index.members)
    check(index, layout, "archive")
    table = _member_table(index.members)
    fields = (
        *(MAGIC, VERSION, index.part, index.parts, len(index.members)),
        *(index.first_frame, index.num_frames, layout.num_frames),
        *(index.bundle_sha256, FRAME_BYTES, len(table)),
    )
    hashes = index.xxh3_64.astype("<u8").tobytes()
    checksum = xxhash.xxh3_64_intdigest(HEADER.pack(*fields, 0) + table + hashes)
    content = HEADER.pack(*fields, checksum) + table + hashes
    frame = SKIPPABLE.pack(INDEX_FRAME_MAGIC, len(content)) + content
    return frame + _seek_table(index, layout, len(frame))


def _seek_table(index: PartIndex, layout: Layout, index_frame_bytes: int) -> bytes:
    sizes = np.empty((index.num_frames + 1, 2), "<u4")
    sizes[:-1, 0] = index.packed_bytes
    sizes[:-1, 1] = _content_bytes(layout, index.first_frame, index.num_frames)
    sizes[-1] = index_frame_bytes, 0
    entries = sizes.tobytes() + FOOTER.pack(len(sizes), 0, SEEK_MAGIC)
    return SKIPPABLE.pack(SEEK_FRAME_MAGIC, len(entries)) + entries


class TrailerReader:
    """Parses what ends a part of `file_bytes` bytes. read(offset, count) gives bytes of the file.

    Nothing is read before its size is known to lie within the file. Raises CorruptFileError, or
    InvalidInputError for a version this program does not know.
    """

    def __init__(self, where: str, file_bytes: int) -> None:
        self.where = where
        self.file_bytes = file_bytes

    def footer_at(self) -> int:
        if self.file_bytes < FOOTER.size + SKIPPABLE.size:
            self._corrupt(f"{self.file_bytes} bytes: not an archive, or cut off")
        return self.file_bytes - FOOTER.size

    def seek_at(self, footer: bytes) -> int:
        """Where the seek table begins, by its footer."""
        entries, descriptor, magic = FOOTER.unpack(footer)
        if magic != SEEK_MAGIC:
            self._corrupt("does not end in a seek table: not an archive, or cut off")
        if descriptor:
            self._corrupt(f"seek table descriptor {descriptor:#x}, expected 0")
        start = self.file_bytes - _seek_bytes(entries)
        if not 2 <= entries <= MAX_FRAMES + 1 or start < entries * MIN_FRAME_BYTES:
            self._corrupt(f"seek table of {entries} frames in a file of {self.file_bytes} bytes")
        return start

    def sizes(self, seek: bytes) -> np.ndarray:
        """[frames + 1, 2] compressed and content bytes of every frame, the index frame last."""
        magic, length = SKIPPABLE.unpack_from(seek)
        if magic != SEEK_FRAME_MAGIC or length != len(seek) - SKIPPABLE.size:
            self._corrupt("seek table: wrong magic or length")
        sizes = np.frombuffer(seek, "<u4", offset=SKIPPABLE.size, count=(length - FOOTER.size) // 4)
        sizes = sizes.reshape(-1, 2).astype(np.int64)
        total = int(sizes[:, 0].sum())
        if total != self.file_bytes - len(seek):
            self._corrupt(f"frames of {total} bytes before a seek table at {self.file_bytes - len(seek)}")
        return sizes

    def index(self, frame: bytes, sizes: np.ndarray) -> PartIndex:
        """The index from its frame and the seek table."""
        magic, length = SKIPPABLE.unpack_from(frame)
        if magic != INDEX_FRAME_MAGIC or length != len(frame) - SKIPPABLE.size or sizes[-1, 1]:
            self._corrupt("index: wrong magic or length")
        content = frame[SKIPPABLE.size :]
        fields = self._header(content)
        (_, _, part, parts, members, first, frames, total_frames, identity, frame_bytes, table_bytes, _) = (
            fields
        )
        expected = _index_bytes(frames, table_bytes)
        if frames != len(sizes) - 1 or expected != len(frame):
            self._corrupt(f"index of {len(frame)} bytes for {len(sizes) - 1} frames, expected {expected}")
        if frame_bytes != FRAME_BYTES:
            self._corrupt(f"frames of {frame_bytes} bytes, expected {FRAME_BYTES}")
        table = content[HEADER.size : HEADER.size + table_bytes]
        found = PartIndex(
            *(part, parts, identity, self._members(table, members), first),
            packed_bytes=sizes[:-1, 0],
            xxh3_64=np.frombuffer(content, "<u8", offset=HEADER.size + table_bytes),
        )
        layout = Layout(found.members)
        if total_frames != layout.num_frames:
            self._corrupt(f"{total_frames} frames in all, the members make {layout.num_frames}")
        check(found, layout, self.where)
        if not np.array_equal(sizes[:-1, 1], _content_bytes(layout, first, frames)):
            self._corrupt("the seek table's content sizes are not those of the members")
        return found

    def _header(self, content: bytes) -> tuple:
        if len(content) < HEADER.size or content[: len(MAGIC)] != MAGIC:
            self._corrupt("index: not an archive of a bundle")
        fields = HEADER.unpack_from(content)
        if fields[1] != VERSION:
            raise InvalidInputError(
                f"{self.where}: archive version {fields[1]}, this program reads version {VERSION}"
            )
        blank = content[: HEADER.size - CHECKSUM_BYTES] + bytes(CHECKSUM_BYTES) + content[HEADER.size :]
        if xxhash.xxh3_64_intdigest(blank) != fields[-1]:
            self._corrupt("index: checksum does not match")
        return fields

    def _members(self, table: bytes, count: int) -> tuple[Member, ...]:
        members = []
        at = 0
        for _ in range(count):
            if len(table) - at < MEMBER.size:
                self._corrupt("member table is cut off")
            size, length = MEMBER.unpack_from(table, at)
            at += MEMBER.size
            name = table[at : at + length]
            if len(name) != length or length > MAX_NAME_BYTES or not name.isascii():
                self._corrupt(f"member {name[:80]!r}: not a plain relative path")
            members.append(Member(name.decode("ascii"), size))
            at += length
        if at != len(table):
            self._corrupt(f"member table of {len(table)} bytes, its {count} members take {at}")
        return tuple(members)

    def _corrupt(self, problem: str) -> NoReturn:
        raise CorruptFileError(f"{self.where}: {problem}")


def check(index: PartIndex, layout: Layout, where: str) -> None:
    """The rules that hold for every part, whoever made it. Raises CorruptFileError."""
    problem = _problem(index, layout)
    if problem:
        raise CorruptFileError(f"{where}: {problem}")


def _problem(index: PartIndex, layout: Layout) -> str | None:
    if not 1 <= index.part <= index.parts <= MAX_PARTS:
        return f"part {index.part} of {index.parts}, expected at most {MAX_PARTS}"
    if not 1 <= len(index.members) <= MAX_MEMBERS:
        return f"{len(index.members)} members, expected 1 to {MAX_MEMBERS}"
    if sum(member.bytes for member in index.members) > MAX_PAYLOAD_BYTES:
        return f"members of more than {MAX_PAYLOAD_BYTES} bytes"
    if not 1 <= index.num_frames <= MAX_FRAMES:
        return f"{index.num_frames} frames, expected 1 to {MAX_FRAMES}"
    if index.first_frame + index.num_frames > layout.num_frames:
        last = index.first_frame + index.num_frames
        return f"frames {index.first_frame} to {last} of an archive of {layout.num_frames}"
    smallest, largest = int(index.packed_bytes.min()), int(index.packed_bytes.max())
    if smallest < MIN_FRAME_BYTES or largest > MAX_PACKED_BYTES:
        return f"frames of {smallest} to {largest} bytes, expected {MIN_FRAME_BYTES} to {MAX_PACKED_BYTES}"
    return names_problem(member.name for member in index.members)


def _content_bytes(layout: Layout, first: int, count: int) -> np.ndarray:
    return np.fromiter((frame.bytes for frame in layout.frames(first, count)), np.int64, count)


def _member_table(members: tuple[Member, ...]) -> bytes:
    pairs = ((MEMBER.pack(m.bytes, len(m.name)), m.name.encode("ascii")) for m in members)
    return b"".join(part for pair in pairs for part in pair)


def _table_bytes(members: tuple[Member, ...]) -> int:
    return sum(MEMBER.size + len(member.name) for member in members)


def _index_bytes(num_frames: int, table_bytes: int) -> int:
    return SKIPPABLE.size + HEADER.size + table_bytes + 8 * num_frames


def _seek_bytes(entries: int) -> int:
    return SKIPPABLE.size + SEEK_ENTRY.size * entries + FOOTER.size
