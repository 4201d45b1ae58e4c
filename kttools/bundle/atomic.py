"""Whole files or none: written beside the target, flushed to disk, renamed."""

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from kttools_runtime.errors import KTError, ResourceError

TEMPORARY_SUFFIX = ".part"
ATTEMPTS_TO_LOCK = 100


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; renames it when the block ends well, removes it otherwise.

    The file is there, empty and locked: open it, do not put another in its place. What killed processes left
    under such names is removed first. OSError inside becomes a KTError; a full disk is ResourceError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        remove_leftovers(path)
        with _held(temporary) as descriptor:
            yield temporary
            if not is_still(temporary, descriptor):
                raise AssertionError(f"{temporary}: not written in place: its lock was lost on the way")
            os.fsync(descriptor)
            os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise translate_oserror(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Removes partial files of `path` whose writers are gone. A living writer's lock keeps its file."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\d+{re.escape(TEMPORARY_SUFFIX)}")
    for entry in path.parent.iterdir():
        if pattern.fullmatch(entry.name):
            with contextlib.suppress(OSError), _locked(entry, os.O_RDWR) as descriptor:
                if is_still(entry, descriptor):
                    entry.unlink()


@contextlib.contextmanager
def _held(temporary: Path) -> Iterator[int]:
    """The file, made anew, locked for as long as the block or this process lasts. Raises OSError.

    Between its making and its locking another writer may take it for a dead one's and remove it.
    """
    for attempt in range(ATTEMPTS_TO_LOCK):
        with contextlib.ExitStack() as stack:
            try:
                descriptor = stack.enter_context(_locked(temporary, os.O_RDWR | os.O_CREAT))
            except BlockingIOError:
                if attempt + 1 == ATTEMPTS_TO_LOCK:
                    raise
                time.sleep(0.001)
                continue
            if is_still(temporary, descriptor):
                yield descriptor
                return
    raise BlockingIOError(errno.EWOULDBLOCK, "other writers keep removing the partial file")


@contextlib.contextmanager
def _locked(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def is_still(path: Path, descriptor: int) -> bool:
    """Whether what is open has its name yet: who held it before may have renamed or removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """The file has either its old content or `data`, whatever happens. Raises KTError or ResourceError."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def translate_oserror(error: OSError, path: Path) -> KTError:
    """The project's exception for a failed write: ResourceError for a full disk, else KTError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{path}: the disk is full; free some space and run again")
    return KTError(f"{path}: cannot be written: {error.strerror or error}")


def flush(path: Path) -> None:
    """What was written to a file, or renamed in a directory, is on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
