"""A bounded forward reader over the first part of a file: nothing is taken that is not there."""

import os
import stat
from pathlib import Path
from typing import NoReturn

from kttools_runtime.errors import CorruptFileError, InvalidInputError

CHUNK_BYTES = 1 << 20


class Cursor:
    """Reads a regular file from its start with pread, a chunk ahead; a context manager.

    limit_bytes: how far it may go. Raises CorruptFileError at the file's end or at the limit, and
    InvalidInputError when the file cannot be read or is no regular file.
    """

    def __init__(self, file: Path, limit_bytes: int) -> None:
        self.file = file
        self.limit_bytes = limit_bytes
        self.position = 0
        self._buffer = b""
        self._buffer_start = 0

    def __enter__(self) -> "Cursor":
        try:
            self._descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise InvalidInputError(f"{self.file}: cannot be read: {error.strerror}") from None
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            raise InvalidInputError(f"{self.file}: not a regular file")
        self.file_bytes = status.st_size
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    @property
    def remaining(self) -> int:
        """Bytes of the file after the position."""
        return self.file_bytes - self.position

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.remaining:
            self.corrupt(f"{count} bytes expected, the file ends after {self.remaining}")
        if count > self.limit_bytes - self.position:
            self.corrupt(f"header larger than {self.limit_bytes} bytes")
        start = self.position - self._buffer_start
        if start + count > len(self._buffer):
            self._fill(count)
            start = 0
        self.position += count
        return self._buffer[start : start + count]

    def integer(self, byte_count: int, is_signed: bool = False) -> int:
        """A little-endian integer."""
        return int.from_bytes(self.take(byte_count), "little", signed=is_signed)

    def corrupt(self, problem: str) -> NoReturn:
        raise CorruptFileError(f"{self.file}: at byte {self.position}: {problem}")

    def _fill(self, count: int) -> None:
        try:
            data = os.pread(self._descriptor, max(count, CHUNK_BYTES), self.position)
        except OSError as error:
            raise InvalidInputError(f"{self.file}: cannot be read: {error.strerror}") from None
        if len(data) < count:
            self.corrupt(f"{count} bytes expected, got {len(data)}: the file changed or is damaged")
        self._buffer, self._buffer_start = data, self.position
