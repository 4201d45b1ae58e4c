"""The parts of one archive as one thing: members, and frames read and checked one at a time."""

import hashlib
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np
import xxhash

from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURE_NAME,
    Manifest,
    parse_manifest,
)

from .frames import decode_frame
from .index import FOOTER, PartIndex, TrailerReader
from .layout import Frame, Layout, Member
from .members import listed_members

PART_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})(?P<suffix>\.[^.]+)")


@dataclass(frozen=True, slots=True)
class Part:
    """One open file. starts: where each of its frames begins."""

    path: Path
    descriptor: int
    index: PartIndex
    starts: np.ndarray

    @property
    def frames(self) -> range:
        return range(self.index.first_frame, self.index.first_frame + self.index.num_frames)


class Archive:
    """An open archive, whole or some of its parts; a context manager.

    Opening reads and checks every index, the manifest (part 1 must be there) and that they agree; so members
    are those of a sound bundle.json. Raises CorruptFileError, InvalidInputError.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.parts: list[Part] = []
        try:
            for path in with_siblings(paths):
                self.parts.append(open_part(path))
            self.parts.sort(key=lambda part: part.index.part)
            first = self.parts[0].index
            self.layout = Layout(first.members)
            self._check_parts()
            self._first_frames = [part.index.first_frame for part in self.parts]
            self.manifest_data = self._read_manifest()
            self.manifest = parse_manifest(self.manifest_data, self.parts[0].path)
            self._check_members(self.manifest)
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        return str(self.parts[0].path)

    @property
    def members(self) -> tuple[Member, ...]:
        return self.layout.members

    def missing_parts(self, frames: range) -> list[int]:
        """Numbers of absent parts that hold, or may hold, one of `frames`, in ascending order."""
        found: list[int] = []
        for gap, numbers in self._gaps():
            if gap.start < frames.stop and frames.start < gap.stop:
                found += numbers
        return found

    def packed_bytes(self, number: int) -> int:
        """Compressed size of a frame that is here."""
        part = self._part(number)
        return int(part.index.packed_bytes[number - part.index.first_frame])

    def is_content(self, frame: Frame, data: bytes) -> bool:
        """Whether `data` is what the index says frame `frame` holds."""
        part = self._part(frame.number)
        expected = int(part.index.xxh3_64[frame.number - part.index.first_frame])
        return len(data) == frame.bytes and bool(xxhash.xxh3_64_intdigest(data) == expected)

    def read(self, frame: Frame) -> bytes:
        """Content of a frame, checked; from any thread. Raises CorruptFileError naming part and frame."""
        part = self._part(frame.number)
        local = frame.number - part.index.first_frame
        name = self.members[frame.member].name if frame.member < len(self.members) else "the end"
        where = f"{part.path}: frame {frame.number} ({name})"
        packed = read_exactly(
            part.descriptor, int(part.starts[local]), int(part.index.packed_bytes[local]), part.path
        )
        data = decode_frame(packed, frame.bytes, where)
        if not self.is_content(frame, data):
            raise CorruptFileError(f"{where}: content does not match the index's checksum")
        if not frame.is_data and data != self.layout.framing(frame.member):
            raise CorruptFileError(f"{where}: not the tar header that this member must have")
        return data

    def close(self) -> None:
        for part in self.parts:
            os.close(part.descriptor)
        self.parts = []

    def __enter__(self) -> "Archive":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _part(self, number: int) -> Part:
        at = bisect_right(self._first_frames, number) - 1
        if at < 0 or number not in self.parts[at].frames:
            raise ValueError(f"frame {number} is in a part that is not here")
        return self.parts[at]

    def _gaps(self) -> Iterator[tuple[range, range]]:
        """Frames that no part holds, with the numbers of the absent parts among which they are."""
        end, number = 0, 1
        for part in self.parts:
            yield range(end, part.frames.start), range(number, part.index.part)
            end, number = part.frames.stop, part.index.part + 1
        yield range(end, self.layout.num_frames), range(number, self.parts[-1].index.parts + 1)

    def _check_parts(self) -> None:
        first = self.parts[0]
        end = 0
        for before, part in zip([None, *self.parts], self.parts, strict=False):
            index = part.index
            if index.bundle_sha256 != first.index.bundle_sha256 or index.members != first.index.members:
                self._corrupt(part, f"is of another archive than {first.path.name}")
            if index.parts != first.index.parts:
                self._corrupt(part, f"part {index.part} of {index.parts}, expected of {first.index.parts}")
            if before is not None and before.index.part == index.part:
                self._corrupt(part, f"is part {index.part}, as is {before.path.name}")
            follows = before is not None and before.index.part + 1 == index.part
            if index.first_frame < end or (follows and index.first_frame != end):
                self._corrupt(part, f"begins with frame {index.first_frame}, the part before ends at {end}")
            end = part.frames.stop
        if first.index.part == 1 and first.index.first_frame:
            self._corrupt(first, f"part 1 begins with frame {first.index.first_frame}")
        last = self.parts[-1]
        if last.index.part == last.index.parts and end != self.layout.num_frames:
            self._corrupt(last, f"the last part ends at frame {end} of {self.layout.num_frames}")

    def _read_manifest(self) -> bytes:
        first = self.parts[0]
        member = self.members[0]
        if member.name != MANIFEST_NAME:
            self._corrupt(first, f"the first member is {member.name!r:.200}, expected {MANIFEST_NAME}")
        if member.bytes > MAX_MANIFEST_BYTES:
            self._corrupt(first, f"{MANIFEST_NAME} of {member.bytes} bytes, expected {MAX_MANIFEST_BYTES}")
        missing = self.missing_parts(self.layout.frames_of(0))
        if missing:
            raise InvalidInputError(f"{first.path}: part {missing[0]} of {first.index.parts} is missing")
        frames = [self.layout.frame(number) for number in self.layout.frames_of(0)]
        data = b"".join(content for frame in frames if (content := self.read(frame)) and frame.is_data)
        if hashlib.sha256(data).digest() != first.index.bundle_sha256:
            self._corrupt(first, f"{MANIFEST_NAME} is not the one the index names")
        return data

    def _check_members(self, manifest: Manifest) -> None:
        """The member table is what the manifest lists, no more and no less."""
        expected = listed_members(manifest, len(self.manifest_data), self._signature_bytes())
        for found, wanted in zip(self.members, expected, strict=False):
            if found != wanted:
                got = f"{found.name!r:.200} of {found.bytes} bytes"
                wanted_text = f"{wanted.name!r:.200} of {wanted.bytes}"
                self._corrupt(self.parts[0], f"member {got}, expected {wanted_text} by {MANIFEST_NAME}")
        if len(self.members) != len(expected):
            got_text = f"{len(self.members)} members, expected {len(expected)} by {MANIFEST_NAME}"
            self._corrupt(self.parts[0], got_text)

    def _signature_bytes(self) -> int | None:
        return next((m.bytes for m in self.members[1:2] if m.name == SIGNATURE_NAME), None)

    def _corrupt(self, part: Part, problem: str) -> NoReturn:
        raise CorruptFileError(f"{part.path}: {problem}")


def open_part(path: Path) -> Part:
    """Opens one file and checks its index. Raises CorruptFileError, InvalidInputError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInputError(f"{path}: not a regular file")
        index = _read_index(path, descriptor, status.st_size)
        starts = np.concatenate([[0], np.cumsum(index.packed_bytes)[:-1]])
        return Part(path, descriptor, index, starts)
    except BaseException:
        os.close(descriptor)
        raise


def _read_index(path: Path, descriptor: int, file_bytes: int) -> PartIndex:
    trailer = TrailerReader(str(path), file_bytes)
    footer = read_exactly(descriptor, trailer.footer_at(), FOOTER.size, path)
    seek_at = trailer.seek_at(footer)
    sizes = trailer.sizes(read_exactly(descriptor, seek_at, file_bytes - seek_at, path))
    index_bytes = int(sizes[-1, 0])
    return trailer.index(read_exactly(descriptor, seek_at - index_bytes, index_bytes, path), sizes)


def read_exactly(descriptor: int, offset: int, count: int, path: Path) -> bytes:
    """`count` bytes at `offset`. Raises CorruptFileError when the file has shrunk, InvalidInputError."""
    try:
        data = os.pread(descriptor, count, offset)
        while len(data) < count and (more := os.pread(descriptor, count - len(data), offset + len(data))):
            data += more
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) != count:
        raise CorruptFileError(f"{path}: truncated at byte {offset + len(data)}")
    return data


def with_siblings(paths: Sequence[Path]) -> Iterator[Path]:
    """The given files; for a single NAME-00001-of-00003.ktz, the other parts that lie beside it, too."""
    if len(paths) != 1 or not (match := PART_NAME.fullmatch(paths[0].name)):
        yield from paths
        return
    for number in range(1, int(match["parts"]) + 1):
        sibling = paths[0].with_name(part_name(match["stem"], number, int(match["parts"]), match["suffix"]))
        if sibling.name == paths[0].name or sibling.exists():
            yield sibling


def part_name(stem: str, part: int, parts: int, suffix: str) -> str:
    return f"{stem}-{part:05d}-of-{parts:05d}{suffix}"
