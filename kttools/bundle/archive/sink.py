"""Frames that come in any order, written and hashed in that of their file; a bound on how many there are."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from kttools.bundle.hashing import HASHES
from kttools_runtime.errors import CorruptFileError
from kttools_runtime.manifest import MANIFEST_NAME, FileEntry

from .layout import Frame
from .staging import StagedFile


class Window:
    """At most `limit` frames between enter() and leave(). The first error ends every wait."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def enter(self) -> None:
        """Waits for room. Raises the error of a frame that failed."""
        self._wait(lambda: self._count < self._limit)
        with self._changed:
            self._count += 1

    def leave(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def wait_empty(self) -> None:
        """Waits until every frame has left. Raises the error of one that failed."""
        self._wait(lambda: self._count == 0)

    def _wait(self, is_met: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or is_met())
            if self._error is not None:
                raise self._error


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a whole file must hash to. entry: None for a file that the manifest does not list.

    hash: of HASHES; XXH3 finds every accident, SHA-256 also forgery where the manifest is known to be right.
    """

    entry: FileEntry | None
    hash: str
    where: str

    def check(self, got: str) -> None:
        """Raises CorruptFileError."""
        expected = getattr(self.entry, self.hash) if self.entry else got
        if self.entry and got != expected:
            problem = f"expected {self.hash} {expected} by {MANIFEST_NAME}, got {got}"
            raise CorruptFileError(f"{self.where}: {self.entry.path}: {problem}")


class FileSink:
    """One file. After its last frame its hash is checked, and it is closed.

    It is not flushed yet: at the end of all files that costs half of what it does while others are written
    (4.6 GB, two cores: 11 s against 15 in all), and until then the kernel writes in the background.
    """

    def __init__(
        self,
        file: StagedFile,
        frames: range,
        verdict: Verdict,
        window: Window,
        on_bytes: Callable[[int], object],
    ) -> None:
        self.file = file
        self._next, self._stop = frames.start, frames.stop
        self._verdict = verdict
        self._window = window
        self._on_bytes = on_bytes
        self._digest = HASHES[verdict.hash]()
        self._ready: dict[int, tuple[Frame, bytes, bool]] = {}
        self._lock = threading.Lock()
        self._is_busy = False

    def deliver(self, frame: Frame, data: bytes, is_kept: bool) -> None:
        """Takes a frame; the thread that brings the next one in order writes and hashes all that are ready.

        is_kept: the file has it. One thread at a time writes to a file: a second one would spin in the kernel
        for its lock, which took a sixth of all time on two cores.
        """
        with self._lock:
            self._ready[frame.number] = (frame, data, is_kept)
            if self._is_busy:
                return
            self._is_busy = True
        while (item := self._take_next()) is not None:
            self._take(*item)

    def _take_next(self) -> tuple[Frame, bytes, bool] | None:
        with self._lock:
            item = self._ready.pop(self._next, None)
            if item is None:
                self._is_busy = False
            else:
                self._next += 1
            return item

    def _take(self, frame: Frame, data: bytes, is_kept: bool) -> None:
        if frame.is_data:
            if not is_kept:
                self.file.write(frame.offset, data)
            self._digest.update(data)
            self._on_bytes(frame.bytes)
        if frame.number + 1 == self._stop:
            self._verdict.check(self._digest.hexdigest())
            self.file.close()
        self._window.leave()
