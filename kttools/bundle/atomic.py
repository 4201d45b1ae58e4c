"""Whole files or none: written beside the target, flushed to disk, renamed."""

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from kttools_runtime.errors import KTError, ResourceError

TEMPORARY_SUFFIX = ".part"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; renames it when the block ends well, removes it otherwise.

    What killed processes left under such names is removed first. OSError inside becomes a KTError; a full
    disk is ResourceError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        remove_leftovers(path)
        with _held(temporary):
            yield temporary
            flush(temporary)
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
            with contextlib.suppress(OSError), _held(entry):
                entry.unlink()


@contextlib.contextmanager
def _held(temporary: Path) -> Iterator[None]:
    """The file, made if need be, locked for as long as the block or this process lasts. Raises OSError."""
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


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
