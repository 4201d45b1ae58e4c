"""One writer for a directory at a time, across processes; the lock goes with the process, however it ends."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from kttools_runtime.errors import KTError

from .atomic import is_still, translate_oserror


@contextlib.contextmanager
def hold_directory(path: Path) -> Iterator[None]:
    """Makes the directory and holds it for this process. Raises KTError when another one has it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise translate_oserror(error, path) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise KTError(f"{path}: another process is writing this bundle; wait for it") from None
            raise translate_oserror(error, path) from error
        if not is_still(path, descriptor):
            raise KTError(f"{path}: another process has just finished here; run again")
        yield
    finally:
        os.close(descriptor)
