"""Where a repair gets bytes from: another directory with the same bundle, or such a directory behind HTTP.

What comes from there is never believed: whoever asks compares sizes and SHA-256 with a manifest.
"""

import contextlib
import http.client
import os
import stat
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Protocol

from kttools_runtime.errors import DownloadError, InvalidInputError, UsageError
from kttools_runtime.version import __version__

TIMEOUT_S = 60.0
SKIP_BYTES = 1 << 20
RETRIED = (408, 425, 429)


class RefusedError(DownloadError):
    """The server answered that it will not: asking again does not help."""


class Source(Protocol):
    """Files by the relative paths of a manifest. str() of it names it in messages."""

    def read(self, path: str, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset` on; fewer, or none, only at the end of the file.

        Raises InvalidInputError (not there, not readable) or DownloadError (worth another try).
        """
        ...


def open_source(text: str) -> Source:
    """SOURCE of the command line: a directory, or the http(s) URL of one. Raises UsageError for others."""
    scheme = urllib.parse.urlsplit(text).scheme.lower()
    if scheme in ("http", "https"):
        return HttpSource(text)
    if Path(text).is_dir():
        return DirectorySource(Path(text))
    raise UsageError(f"{text}: expected a directory with the same bundle, or the http(s) URL of one")


class DirectorySource:
    """A directory that can be read."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read(self, path: str, offset: int, size: int) -> bytes:
        file = self.root / path
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise InvalidInputError(f"{file}: not a regular file")
                return os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InvalidInputError(f"{file}: cannot be read: {error.strerror}") from None


class HttpSource:
    """A directory behind a web server; one connection, used by one thread.

    Ranges are asked for. A server that ignores them sends the whole file: what lies before `offset` is
    skipped, and reads that follow each other go on in the same answer either way.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._answer: http.client.HTTPResponse | None = None
        self._place: tuple[str, int] | None = None

    def __str__(self) -> str:
        return self.url

    def read(self, path: str, offset: int, size: int) -> bytes:
        try:
            if self._answer is None or self._place != (path, offset):
                self._open(path, offset)
            return self._take(path, offset, size)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:
                return b""  # the range begins at the end of the file
            if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in RETRIED:
                raise RefusedError(f"{self.url}/{path}: {_reason(error)}") from None
            raise DownloadError(f"{self.url}/{path}: {_reason(error)}") from None

    def close(self) -> None:
        """Forgets the answer that was being read."""
        answer, self._answer, self._place = self._answer, None, None
        if answer is not None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                answer.close()

    def _open(self, path: str, offset: int) -> None:
        self.close()
        headers = {"User-Agent": f"kttools/{__version__}", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        request = urllib.request.Request(f"{self.url}/{urllib.parse.quote(path)}", headers=headers)
        self._answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        at = _range_start(self._answer) if self._answer.status == 206 else 0
        if at > offset:
            raise DownloadError(
                f"{self.url}/{path}: asked for bytes from {offset} on, got those from {at} on"
            )
        while at < offset:
            skipped = self._answer.read(min(SKIP_BYTES, offset - at))
            if not skipped:
                break
            at += len(skipped)
        self._place = (path, offset)

    def _take(self, path: str, offset: int, size: int) -> bytes:
        assert self._answer is not None
        data = bytearray()
        while len(data) < size and (piece := self._answer.read(size - len(data))):
            data += piece
        if not data and self._answer.length:  # what was promised and did not come
            raise http.client.IncompleteRead(b"", self._answer.length)
        self._place = (path, offset + len(data))
        return bytes(data)


def _range_start(answer: http.client.HTTPResponse) -> int:
    """First byte of a partial answer, from `Content-Range: bytes 5-9/10`."""
    unit, _, rest = (answer.getheader("Content-Range") or "").strip().partition(" ")
    first = rest.partition("-")[0]
    if unit != "bytes" or not (first.isascii() and first.isdigit() and len(first) < 20):
        raise http.client.HTTPException("a partial answer that does not say which part it is")
    return int(first)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code}"
    if isinstance(error, urllib.error.URLError):
        return f"cannot be reached: {error.reason}"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended early"
    return str(error) or type(error).__name__
