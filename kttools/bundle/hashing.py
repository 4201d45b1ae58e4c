"""File hashes in one streaming pass: SHA-256 for provenance, XXH3-128 for fast checks."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from kttools_runtime.errors import InvalidInputError

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and hashes of one file, hex in lower case."""

    bytes: int
    xxh3_128: str
    sha256: str


class StreamingDigest:
    """Both hashes of bytes as they pass by; both libraries release the GIL on large blocks."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._xxh3 = xxhash.xxh3_128()
        self._bytes = 0

    def update(self, data: Any) -> None:
        """data: any bytes-like object."""
        self._sha256.update(data)
        self._xxh3.update(data)
        self._bytes += memoryview(data).nbytes

    def finish(self) -> FileDigest:
        return FileDigest(self._bytes, self._xxh3.hexdigest(), self._sha256.hexdigest())


def digest_file(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> FileDigest:
    """Both hashes of a file. on_bytes: called with the size of each block. Raises InvalidInputError."""
    digest = StreamingDigest()
    block = memoryview(bytearray(BLOCK_BYTES))
    try:
        with Path(path).open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(block[:count])
                if on_bytes:
                    on_bytes(count)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.finish()


def sha256_file(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file in hex, as model hubs list it."""
    return digest_file(path, on_bytes).sha256
