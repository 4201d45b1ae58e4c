"""Archive files into a bundle: frames decoded by all threads, every byte hashed before anything has its name.

A frame's way: read, decoded, held against the index; then, in the order of its file and by whichever thread
completes the order, written to a file in a hidden folder and hashed. When the hash of every file is the
manifest's, all are flushed and the folder is renamed. A rerun takes a frame from the folder instead where it
is already there, after the same check.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kttools_runtime.errors import InvalidInputError
from kttools_runtime.heap import keep_free_memory
from kttools_runtime.manifest import MANIFEST_NAME, SIGNATURE_NAME, parse_manifest, presence_problem

from .layout import Frame
from .reader import Archive
from .sink import FileSink, Verdict, Window
from .staging import StagedFile, Staging

MAX_FILES_AT_ONCE = 4
# What shrinks so much is zeros, which take no space where there are holes.
HOLE_RATIO = 2048


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What unpack did. kept_frames: an earlier run had left them; both 0: the target was there already."""

    target: Path
    files: int
    bytes: int
    decoded_frames: int
    kept_frames: int


class Unpacker:
    """Files of an archive into the new folder `target`.

    names: members to take. replaced: members whose bytes are given instead (a part's manifest). is_exchange:
    compare SHA-256, as is done anyway where the manifest is signed, and not XXH3. Raises
    CorruptFileError, InvalidInputError (a part is missing), ResourceError (no space), UsageError (the target
    exists), KTError (another process is at it); the target then does not exist.
    """

    def __init__(
        self,
        archive: Archive,
        target: Path,
        names: list[str],
        replaced: dict[str, bytes] | None = None,
        threads: int | None = None,
        is_exchange: bool = False,
    ) -> None:
        self.archive = archive
        self.staging = Staging(target)
        manifest = {MANIFEST_NAME: archive.manifest_data} if MANIFEST_NAME in names else {}
        self.replaced = manifest | (replaced or {})
        is_signed = any(member.name == SIGNATURE_NAME for member in archive.members)
        self.hash = "sha256" if is_exchange or is_signed else "xxh3_128"
        self.threads = threads or len(os.sched_getaffinity(0))
        self._chosen = [i for i, member in enumerate(archive.members) if member.name in set(names)]
        self._decode = [i for i in self._chosen if archive.members[i].name not in self.replaced]
        self._counts_lock = threading.Lock()
        self._decoded = self._kept = 0

    @property
    def total_bytes(self) -> int:
        """Of the chosen members."""
        return sum(self.archive.members[index].bytes for index in self._chosen)

    def run(self, on_bytes: Callable[[int], object] | None = None) -> Unpacked:
        """Unpacks. on_bytes: bytes done, from any thread."""
        self._check_parts()
        if self._is_done():
            return Unpacked(self.staging.target, len(self._chosen), self.total_bytes, 0, 0)
        self.staging.check_target()
        names = [self.archive.members[index].name for index in self._chosen]
        self._check_space(names)
        keep_free_memory()
        with self.staging.held(names):
            self.staging.check_target()
            self._take(on_bytes or _ignore)
            for name, data in self.replaced.items():
                self.staging.write_small(name, data)
            self.staging.finish()
        return Unpacked(self.staging.target, len(names), self.total_bytes, self._decoded, self._kept)

    def _is_done(self) -> bool:
        """Whether the target is this very bundle already: a run was killed at its last instruction."""
        data = self.replaced.get(MANIFEST_NAME)
        target = self.staging.target
        if data is None or not (target / MANIFEST_NAME).is_file():
            return False
        manifest = parse_manifest(data, target)
        is_same = (target / MANIFEST_NAME).read_bytes() == data
        return is_same and not any(presence_problem(target, entry) for entry in manifest.files.values())

    def _check_parts(self) -> None:
        for index in self._decode:
            missing = self.archive.missing_parts(self.archive.layout.frames_of(index))
            if missing:
                parts = self.archive.parts[0].index.parts
                some = ", ".join(map(str, missing[:8]))
                name = self.archive.members[index].name
                raise InvalidInputError(
                    f"{self.archive.name}: {name} needs a part that is missing: {some} of {parts}"
                )

    def _check_space(self, names: list[str]) -> None:
        """Room for all that is not there yet and not a hole; said before the work."""
        needed = sum(self._written_bytes(index) for index in self._decode)
        needed = max(0, needed - self.staging.allocated_bytes(names))
        self.staging.check_space(needed)

    def _written_bytes(self, index: int) -> int:
        layout = self.archive.layout
        frames = (layout.frame(number) for number in layout.frames_of(index))
        packed = self.archive.packed_bytes
        return sum(f.bytes for f in frames if f.is_data and packed(f.number) * HOLE_RATIO >= f.bytes)

    def _take(self, on_bytes: Callable[[int], object]) -> None:
        """All frames of the chosen members, with a bounded number of them in memory."""
        window = Window(2 * self.threads + MAX_FILES_AT_ONCE)
        sinks: dict[int, FileSink] = {}
        pool = ThreadPoolExecutor(self.threads, "unpack")
        try:
            for frame in self._in_turns():
                window.enter()
                if frame.member not in sinks:
                    sinks[frame.member] = self._open(frame.member, window, on_bytes)
                pool.submit(self._process, frame, sinks[frame.member], window)
            window.wait_empty()
        finally:
            pool.shutdown(cancel_futures=True)
            for sink in sinks.values():
                sink.file.close()

    def _in_turns(self) -> Iterator[Frame]:
        """Large files first, and with many threads a few at a time: a hash takes a file in order."""
        members = self.archive.members
        largest = deque(sorted(self._decode, key=lambda index: -members[index].bytes))
        layout = self.archive.layout
        active: deque[Iterator[int]] = deque()
        while largest or active:
            while largest and len(active) < max(1, min(MAX_FILES_AT_ONCE, self.threads // 2)):
                active.append(iter(layout.frames_of(largest.popleft())))
            numbers = active.popleft()
            number = next(numbers, None)
            if number is not None:
                active.append(numbers)
                yield layout.frame(number)

    def _open(self, index: int, window: Window, on_bytes: Callable[[int], object]) -> FileSink:
        member = self.archive.members[index]
        file = StagedFile(self.staging.root / member.name, member.bytes)
        entry = self.archive.manifest.files.get(member.name)
        frames = self.archive.layout.frames_of(index)
        return FileSink(file, frames, Verdict(entry, self.hash, self.archive.name), window, on_bytes)

    def _process(self, frame: Frame, sink: FileSink, window: Window) -> None:
        """In a worker. An error goes to whoever waits at the window."""
        try:
            data, is_kept = self._content(frame, sink.file)
            with self._counts_lock:
                self._kept += is_kept
                self._decoded += not is_kept
            sink.deliver(frame, data, is_kept)
        except BaseException as error:
            window.fail(error)

    def _content(self, frame: Frame, file: StagedFile) -> tuple[bytes, bool]:
        """What a frame holds, and whether its file had it already."""
        if frame.is_data and file.is_resumed:
            data = file.read(frame.offset, frame.bytes)
            if self.archive.is_content(frame, data):
                return data, True
        return self.archive.read(frame), False


def _ignore(_: int) -> None:
    return None
