"""Whole files or none: written beside the target, flushed to disk, renamed."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from kttools_runtime.errors import KTError, ResourceError

TEMPORARY_SUFFIX = ".part"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; renames it when the block ends well, removes it otherwise.

    OSError inside becomes a KTError; a full disk is ResourceError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise translate_oserror(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
