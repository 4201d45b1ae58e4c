"""One file from the hub into a partial file beside its place: resumed by ranges, verified at the end."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from kttools.bundle.atomic import translate_oserror
from kttools_runtime.errors import CorruptFileError, DownloadError, InvalidInputError

from .client import Hub, RemoteFile, TransientError

ATTEMPTS_WITHOUT_PROGRESS = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
READ_BYTES = 4 << 20
OnBytes = Callable[[int], object]


class Stopped(Exception):
    """Another thread's download failed, or the user wants to leave."""


class Hash(Protocol):
    """What hashlib's objects have."""

    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


def fetch(
    hub: Hub,
    file: RemoteFile,
    part: Path,
    on_bytes: OnBytes = lambda count: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Completes `part` and verifies it; what an earlier run left in it is not fetched again.

    on_bytes: bytes received, negative where some turned out to be worthless. Raises CorruptFileError for
    content other than promised; DownloadError, ResourceError or KTError, after which `part` can be resumed.
    """
    had = part.exists() and part.stat().st_size > 0
    if _attempt(hub, file, part, on_bytes, should_stop):
        return
    on_bytes(-file.bytes)
    # Bytes of an earlier run may have been torn by a power cut: then the whole file comes once more.
    if not had or not _attempt(hub, file, part, on_bytes, should_stop):
        raise CorruptFileError(
            f"{hub}: {file.path}: the content is not what is listed: expected {file.key}, got another hash"
        )


def matches(path: Path, file: RemoteFile) -> bool:
    """Whether a local file is that file, by size and hash. Raises InvalidInputError (not readable)."""
    try:
        if not path.is_file() or path.stat().st_size != file.bytes:
            return False
        digest = _new_hash(file)
        with path.open("rb", buffering=0) as stream:
            while block := stream.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest() == (file.sha256 or file.git_sha1)


def _attempt(
    hub: Hub, file: RemoteFile, part: Path, on_bytes: OnBytes, should_stop: Callable[[], bool]
) -> bool:
    """True when `part` is whole and right; where it is wrong, it is removed."""
    try:
        with _Part(part, file) as sink:
            _fill(hub, file, sink, on_bytes, should_stop)
            is_right = sink.is_right()
        if not is_right:
            part.unlink()
    except OSError as error:
        raise translate_oserror(error, part) from error
    return is_right


def _fill(
    hub: Hub, file: RemoteFile, sink: "_Part", on_bytes: OnBytes, should_stop: Callable[[], bool]
) -> None:
    """Asks again and again from where the last answer ended, as long as that leads on."""
    failures = 0
    while sink.length < file.bytes:
        before = sink.length
        try:
            _receive(hub, file, sink, on_bytes, should_stop)
        except TransientError as error:
            failures = 1 if sink.length > before else failures + 1
            if failures > ATTEMPTS_WITHOUT_PROGRESS:
                kept = f"{sink.length} of {file.bytes} bytes are kept"
                raise DownloadError(f"{error}; {kept}") from error
            _wait(min(FIRST_WAIT_S * 2 ** (failures - 1), LONGEST_WAIT_S), should_stop)


def _receive(
    hub: Hub, file: RemoteFile, sink: "_Part", on_bytes: OnBytes, should_stop: Callable[[], bool]
) -> None:
    with hub.open(file.path, sink.length, file.bytes) as body:
        if body.start != sink.length:  # no ranges here: the whole file comes again
            on_bytes(-sink.length)
            sink.restart()
        for chunk in body.chunks:
            if should_stop():
                raise Stopped
            if sink.length + len(chunk) > file.bytes:
                raise CorruptFileError(f"{hub}: {file.path}: the hub sends more than {file.bytes} bytes")
            sink.write(chunk)
            on_bytes(len(chunk))
    if sink.length < file.bytes:
        raise TransientError(f"{hub}: {file.path}: the answer ended at byte {sink.length} of {file.bytes}")


def _wait(seconds: float, should_stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if should_stop():
            raise Stopped
        time.sleep(min(left, 0.1))


class _Part:
    """The partial file, open for appending, and the hash of what it holds. Methods raise OSError."""

    def __init__(self, path: Path, file: RemoteFile) -> None:
        self._file = file
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o666)
        self.restart(os.fstat(self._descriptor).st_size)

    def restart(self, length: int = 0) -> None:
        """Keeps the first `length` bytes (none of a file that is too long), hashed."""
        self.length = length if length <= self._file.bytes else 0
        self._hash = _new_hash(self._file)
        os.ftruncate(self._descriptor, self.length)
        done = 0
        while done < self.length:
            block = os.pread(self._descriptor, min(READ_BYTES, self.length - done), done)
            self._hash.update(block)
            done += len(block)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._descriptor, view, self.length)
            self._hash.update(view[:count])
            view, self.length = view[count:], self.length + count

    def is_right(self) -> bool:
        """Compares the hash; what is right is flushed to disk."""
        if self._hash.hexdigest() != (self._file.sha256 or self._file.git_sha1):
            return False
        os.fsync(self._descriptor)
        return True

    def __enter__(self) -> "_Part":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def _new_hash(file: RemoteFile) -> Hash:
    if file.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.bytes, usedforsecurity=False)
