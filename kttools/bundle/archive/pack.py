"""A bundle into archive files: frames compressed by all threads, written in order, hashed on the way."""

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kttools.bundle.lock import hold_directory
from kttools_runtime.errors import CorruptFileError, InvalidInputError, ResourceError, UsageError
from kttools_runtime.manifest import (
    MANIFEST_NAME,
    Manifest,
    presence_problem,
    read_manifest,
)

from .frames import encode_frame
from .index import trailer_bytes
from .layout import Frame, Layout
from .members import bundle_members
from .names import names_problem
from .parts import SUFFIX, PartWriter, existing_parts, is_whole_set
from .reader import read_exactly

# zstd finds nothing in quantised weights but uneven bytes, and level 1 finds those as well as level 9.
DEFAULT_LEVEL = 1
MAX_LEVEL = 19


@dataclass(frozen=True, slots=True)
class Packed:
    """What pack made. bytes: of the bundle's files; packed_bytes: of the parts."""

    parts: list[Path]
    bytes: int
    packed_bytes: int
    frames: int


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A frame on its way from a worker to the file. xxh3_64: of the content."""

    frame: Frame
    content: bytes
    packed: bytes
    xxh3_64: int


class Packer:
    """One archive of one bundle. Raises CorruptFileError when the bundle is not what its manifest says."""

    def __init__(
        self,
        bundle: Path,
        output: Path,
        *,
        split_bytes: int | None = None,
        level: int = DEFAULT_LEVEL,
        threads: int | None = None,
        is_forced: bool = False,
    ) -> None:
        if output.suffix != SUFFIX:
            raise UsageError(f"{output}: an archive's name ends in {SUFFIX}")
        if not 0 <= level <= MAX_LEVEL:
            raise UsageError(f"level {level}, expected 0 (store) to {MAX_LEVEL}")
        self.manifest: Manifest = read_manifest(bundle)
        self.members = bundle_members(self.manifest)
        self.layout = Layout(self.members)
        self.output = output
        self.split_bytes = split_bytes
        self.level = level
        self.threads = threads or len(os.sched_getaffinity(0))
        self.is_forced = is_forced
        self._check_bundle()

    @property
    def total_bytes(self) -> int:
        """Of all members."""
        return sum(member.bytes for member in self.members)

    def run(self, on_bytes: Callable[[int], object] | None = None) -> Packed:
        """Writes the archive. on_bytes: bytes of the bundle, as they are done."""
        before = self._check_output()
        staging = self.output.with_name(f".{self.output.name}.pack")
        with hold_directory(staging):
            _clear(staging)
            self._check_space()
            try:
                paths = self._write(staging, before, on_bytes or _ignore)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        total = sum(path.stat().st_size for path in paths)
        return Packed(paths, self.total_bytes, total, self.layout.num_frames)

    def _write(self, staging: Path, before: list[Path], on_bytes: Callable[[int], object]) -> list[Path]:
        data = read_whole(self.manifest.root / MANIFEST_NAME, self.members[0].bytes)
        writer = PartWriter(
            self.output, staging, self.layout, hashlib.sha256(data).digest(), self.split_bytes
        )
        checksum = _Checksum(self.manifest)
        try:
            for encoded in self._encoded():
                checksum.update(self.members, encoded.frame, encoded.content)
                writer.write(encoded.packed, encoded.xxh3_64)
                if encoded.frame.is_data:
                    on_bytes(encoded.frame.bytes)
            checksum.finish()
            return writer.finish(before)
        finally:
            writer.close()

    def _encoded(self) -> Iterator[_Encoded]:
        """All frames in order; workers are a few frames ahead, so memory is bounded."""
        waiting: deque[Future[_Encoded]] = deque()
        with ThreadPoolExecutor(self.threads, "pack") as pool:
            try:
                for frame in self.layout.frames(0, self.layout.num_frames):
                    waiting.append(pool.submit(self._encode, frame))
                    if len(waiting) > 2 * self.threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _encode(self, frame: Frame) -> _Encoded:
        if frame.is_data:
            path = self.manifest.root / self.members[frame.member].name
            content = read_region(path, frame.offset, frame.bytes)
        else:
            content = self.layout.framing(frame.member)
        packed = encode_frame(content, self.level)
        return _Encoded(frame, content, packed, xxhash.xxh3_64_intdigest(content))

    def _check_bundle(self) -> None:
        root = self.manifest.root
        problem = names_problem(member.name for member in self.members)
        if problem:
            raise InvalidInputError(f"{root}: {problem}; such a bundle cannot be packed")
        for entry in self.manifest.files.values():
            problem = presence_problem(root, entry)
            if problem:
                raise CorruptFileError(f"{root / entry.path}: {problem}; run kttools verify")

    def _check_output(self) -> list[Path]:
        """What stands under the archive's names: of a cut-off run, or to be replaced by --force.

        Raises UsageError where it is an archive and --force is not given.
        """
        before = existing_parts(self.output)
        if before and is_whole_set(before) and not self.is_forced:
            raise UsageError(f"{before[0]}: already there; choose another -o, or --force to replace it")
        if self.output.resolve().is_relative_to(self.manifest.root.resolve()):
            raise UsageError(f"{self.output}: lies in the bundle; choose another -o")
        return before

    def _check_space(self) -> None:
        """Room for the archive as if nothing shrank; said before the work."""
        needed = self.total_bytes + trailer_bytes(self.layout.num_frames, self.members)
        free = shutil.disk_usage(self.output.parent).free
        if free < needed:
            raise ResourceError(
                f"{self.output}: needs up to {needed} bytes, {free} are free; "
                "free some space or choose another -o"
            )


class _Checksum:
    """Content as it passes, file by file, against the manifest's fast hash."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._name: str | None = None
        self._hash = xxhash.xxh3_128()

    def update(self, members: tuple, frame: Frame, content: bytes) -> None:
        if frame.is_data:
            self._hash.update(content)
            return
        self.finish()
        self._name = members[frame.member].name if frame.member < len(members) else None

    def finish(self) -> None:
        """At the end of a file."""
        entry = self.manifest.files.get(self._name or "")
        if entry is not None and self._hash.hexdigest() != entry.xxh3_128:
            raise CorruptFileError(
                f"{self.manifest.root / entry.path}: content changed: expected xxh3_128 {entry.xxh3_128}, "
                f"got {self._hash.hexdigest()}; run kttools verify"
            )
        self._name = None
        self._hash.reset()


def read_region(path: Path, offset: int, count: int) -> bytes:
    """`count` bytes of a file at `offset`. Raises InvalidInputError, CorruptFileError when it is shorter."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return read_exactly(descriptor, offset, count, path)
    finally:
        os.close(descriptor)


def read_whole(path: Path, count: int) -> bytes:
    return read_region(path, 0, count)


def _clear(staging: Path) -> None:
    for leftover in staging.iterdir():
        leftover.unlink()


def _ignore(_: int) -> None:
    return None
