"""Mends a bundle from another copy of it: only broken files come again, and none replaces one unverified.

The new file is made beside the broken one, compared with the manifest's size and SHA-256, flushed and
renamed. A run that was cut off goes on where it stopped. The bundle's own manifest decides what is right;
only where that is damaged itself, the source's is taken.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kttools_runtime.errors import CorruptFileError, DownloadError, InvalidInputError, ResourceError
from kttools_runtime.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURE_NAME,
    FileEntry,
    parse_manifest,
    read_manifest,
)

from .atomic import TEMPORARY_SUFFIX, atomic_write_bytes, translate_oserror
from .byte_source import RefusedError, Source
from .hashing import OnBytes
from .lock import hold_directory

READ_BYTES = 4 << 20
ATTEMPTS = 5
FIRST_WAIT_S = 0.2
MAX_SIGNATURE_BYTES = 8192


def _ignore(_: int) -> None:
    return None


class Supplier(Protocol):
    """What a repair needs of a source: its manifest, and files completed in a partial file."""

    def read_small(self, path: str, max_bytes: int) -> bytes:
        """The whole of a small file. Raises CorruptFileError when it is larger."""
        ...

    def fetch(self, entry: FileEntry, part: Path, on_bytes: Callable[[int], object]) -> None:
        """Leaves the verified content of `entry` in `part`; bytes already there need not come again."""
        ...


class BlockSupplier:
    """A Supplier made of a Source that reads bytes at an offset."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __str__(self) -> str:
        return str(self.source)

    def read_small(self, path: str, max_bytes: int) -> bytes:
        """Raises CorruptFileError when it is larger than that."""
        data = b""
        while piece := self._read(path, len(data), READ_BYTES):
            data += piece
            if len(data) > max_bytes:
                raise CorruptFileError(f"{self.source}/{path}: larger than the {max_bytes} bytes it may have")
        return data

    def fetch(self, entry: FileEntry, part: Path, on_bytes: Callable[[int], object]) -> None:
        """Raises CorruptFileError when the source's file is another one, DownloadError when it is cut off."""
        had = part.stat().st_size if part.exists() else 0
        if self._is_completed(entry, part, on_bytes):
            return
        part.unlink(missing_ok=True)
        # What an earlier run left may have been torn by a power cut: then all of it comes once more.
        if not had or not self._is_completed(entry, part, on_bytes):
            part.unlink(missing_ok=True)
            raise CorruptFileError(
                f"{self.source}/{entry.path}: not the file of this bundle: expected {entry.bytes} bytes with"
                f" sha256 {entry.sha256}"
            )

    def _is_completed(self, entry: FileEntry, part: Path, on_bytes: Callable[[int], object]) -> bool:
        digest, done = hashlib.sha256(), 0
        with part.open("a+b") as file:
            file.seek(0)
            while piece := file.read(READ_BYTES):
                digest.update(piece)
                done += len(piece)
            on_bytes(done)
            while done < entry.bytes:
                piece = self._read(entry.path, done, min(READ_BYTES, entry.bytes - done))
                if not piece:
                    return False
                file.write(piece)
                digest.update(piece)
                done += len(piece)
                on_bytes(len(piece))
            file.flush()
            os.fsync(file.fileno())
        return done == entry.bytes and digest.hexdigest() == entry.sha256

    def _read(self, path: str, offset: int, size: int) -> bytes:
        """With patience for a connection that breaks."""
        for attempt in range(ATTEMPTS - 1):
            try:
                return self.source.read(path, offset, size)
            except RefusedError:
                raise
            except DownloadError:
                time.sleep(FIRST_WAIT_S * 2**attempt)
        return self.source.read(path, offset, size)


def repair_files(
    root: Path,
    broken: list[str],
    supplier: Supplier,
    on_start: OnBytes = _ignore,
    on_bytes: OnBytes = _ignore,
) -> list[str]:
    """Replaces these listed files of the bundle; returns their paths.

    Raises ResourceError before anything is fetched when the disk cannot hold what is missing and the largest
    new file beside its broken one; and what the supplier raises: files that were finished by then stay.
    """
    with hold_directory(root):
        manifest = read_manifest(root)
        entries = [manifest.files[path] for path in broken]
        absent = sum(entry.bytes for entry in entries if not os.path.lexists(root / entry.path))
        needed = absent + max((entry.bytes for entry in entries), default=0)
        free = shutil.disk_usage(root).free
        if needed > free:
            raise ResourceError(f"{root}: not enough disk: {needed} bytes needed, {free} available")
        on_start(sum(entry.bytes for entry in entries))
        for entry in entries:
            _replace(root, entry, supplier, on_bytes)
    return [entry.path for entry in entries]


def repair_manifest(root: Path, supplier: Supplier, wants_signature: bool = False) -> list[str]:
    """Takes the source's manifest where the bundle's own cannot be read, and a signature where one is asked.

    Returns the names of what was taken. Raises CorruptFileError when the source's manifest is damaged, too.
    """
    if not root.is_dir():
        raise InvalidInputError(f"{root}: no such directory")
    taken = []
    try:
        read_manifest(root)
    except InvalidInputError:
        data = supplier.read_small(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        parse_manifest(data, Path(str(supplier)))
        with hold_directory(root):
            atomic_write_bytes(root / MANIFEST_NAME, data)
        taken.append(MANIFEST_NAME)
    if wants_signature and (taken or not os.path.lexists(root / SIGNATURE_NAME)):
        with hold_directory(root):
            atomic_write_bytes(
                root / SIGNATURE_NAME, supplier.read_small(SIGNATURE_NAME, MAX_SIGNATURE_BYTES)
            )
        taken.append(SIGNATURE_NAME)
    return taken


def _replace(root: Path, entry: FileEntry, supplier: Supplier, on_bytes: OnBytes) -> None:
    path = root / entry.path
    if not path.parent.resolve().is_relative_to(root.resolve()):
        raise CorruptFileError(f"{path.parent}: a symbolic link leads out of the bundle; remove it first")
    part = path.with_name(f".{path.name}.repair{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.is_symlink() or (part.exists() and not part.is_file()):
            raise CorruptFileError(f"{part}: not a regular file; remove it first")
        try:
            supplier.fetch(entry, part, on_bytes)
        finally:
            if part.exists() and not part.stat().st_size and entry.bytes:
                part.unlink()  # nothing to go on from
        os.replace(part, path)
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise translate_oserror(error, path) from error
