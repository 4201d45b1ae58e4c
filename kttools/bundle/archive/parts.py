"""Writes the files of an archive: frames in order, cut into parts, named when all of them are whole."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kttools.bundle.atomic import flush, translate_oserror
from kttools_runtime.errors import UsageError

from .frames import encode_frame
from .index import PartIndex, build_trailer, trailer_bytes
from .layout import FRAME_BYTES, Layout
from .reader import PART_NAME, part_name

SUFFIX = ".ktz"


@dataclass
class _Open:
    """A part in the making."""

    path: Path
    descriptor: int
    first_frame: int
    bytes: int = 0
    packed_bytes: list[int] = field(default_factory=list)
    xxh3_64: list[int] = field(default_factory=list)


class PartWriter:
    """Parts under temporary names beside `output`, in the folder `staging`; finish() gives them theirs.

    Without split_bytes there is one file, `output`; with it NAME-00001-of-0000N.ktz, each at most so large.
    Part 1 is named last: a set without it was cut off, and a rerun replaces it. Raises UsageError,
    ResourceError (disk full), KTError.
    """

    def __init__(
        self, output: Path, staging: Path, layout: Layout, identity: bytes, split_bytes: int | None
    ) -> None:
        self.output = output
        self.staging = staging
        self.layout = layout
        self.identity = identity
        self.split_bytes = split_bytes
        self._done: list[_Open] = []
        self._part: _Open | None = None
        self._frames = 0
        if split_bytes is not None:
            self._check_split(split_bytes)
        if PART_NAME.fullmatch(output.name):
            raise UsageError(f"{output}: looks like a part of another archive; choose another name")

    def write(self, packed: bytes, xxh3_64: int) -> None:
        """The next frame."""
        part = self._part
        if part is None or not self._fits(part, len(packed)):
            part = self._next()
        try:
            _write_all(part.descriptor, packed)
        except OSError as error:
            raise translate_oserror(error, self.output) from error
        part.bytes += len(packed)
        part.packed_bytes.append(len(packed))
        part.xxh3_64.append(xxh3_64)
        self._frames += 1

    def finish(self, replaced: Sequence[Path] = ()) -> list[Path]:
        """Ends and flushes all parts; removes `replaced`, part 1 first; names the parts, part 1 last."""
        names = self._names()
        try:
            for number, part in enumerate(self._done, 1):
                _write_all(part.descriptor, self._trailer(number, part))
                os.fsync(part.descriptor)
            for old in replaced:
                old.unlink(missing_ok=True)
            for part, name in reversed(list(zip(self._done, names, strict=True))):
                os.replace(part.path, name)
            flush(self.output.parent)
        except OSError as error:
            raise translate_oserror(error, self.output) from error
        self.close()
        return names

    def close(self) -> None:
        """Lets go of the files; what is not finished keeps its temporary name."""
        for part in self._done:
            with contextlib.suppress(OSError):
                os.close(part.descriptor)
        self._done = []

    def _fits(self, part: _Open, count: int) -> bool:
        if self.split_bytes is None:
            return True
        frames = len(part.packed_bytes) + 1
        return part.bytes + count + trailer_bytes(frames, self.layout.members) <= self.split_bytes

    def _next(self) -> _Open:
        path = self.staging / f"{len(self._done) + 1:05d}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._part = _Open(path, os.open(path, flags, 0o666), self._frames)
        except OSError as error:
            raise translate_oserror(error, self.output) from error
        self._done.append(self._part)
        return self._part

    def _trailer(self, number: int, part: _Open) -> bytes:
        return build_trailer(
            PartIndex(
                *(number, len(self._done), self.identity, self.layout.members, part.first_frame),
                packed_bytes=np.array(part.packed_bytes, np.int64),
                xxh3_64=np.array(part.xxh3_64, np.uint64),
            )
        )

    def _names(self) -> list[Path]:
        count = len(self._done)
        if self.split_bytes is None:
            return [self.output]
        return [
            self.output.with_name(part_name(self.output.stem, number, count, SUFFIX))
            for number in range(1, count + 1)
        ]

    def _check_split(self, split_bytes: int) -> None:
        largest = min(FRAME_BYTES, max(member.bytes for member in self.layout.members))
        least = len(encode_frame(bytes(largest), 0)) + trailer_bytes(1, self.layout.members)
        if split_bytes < least:
            raise UsageError(f"parts of {split_bytes} bytes are too small, expected at least {least}")


def existing_parts(output: Path) -> list[Path]:
    """Files that an archive of this name has, one file or numbered parts, in order."""
    if not output.parent.is_dir():
        return []
    found = [path for path in output.parent.iterdir() if _is_part(path, output)]
    return sorted(found, key=lambda path: path.name)


def is_whole_set(parts: Sequence[Path]) -> bool:
    """Whether parts that exist are an archive, and not what a cut-off run left: part 1 is there."""
    matches = [PART_NAME.fullmatch(path.name) for path in parts]
    return any(match is None or int(match["part"]) == 1 for match in matches)


def _is_part(path: Path, output: Path) -> bool:
    match = PART_NAME.fullmatch(path.name)
    return path.name == output.name or (
        match is not None and match["stem"] == output.stem and match["suffix"] == SUFFIX
    )


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
