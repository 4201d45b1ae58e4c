"""Writes a pack expert by expert, in any order and from any thread; it gets its name when it is whole."""

import contextlib
import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from . import _kernels
from .errors import KTError, ResourceError, UsageError
from .pack import LAYOUT, PackedExpert, PackHeader, format_names, header_bytes, header_size, validate


def plan_header(
    *, layer: int, hidden_size: int, moe_intermediate_size: int, formats: Sequence[str]
) -> PackHeader:
    """The header of a pack to be written, with zero checksums; sizes from shapes alone.

    formats: name of each expert's format. Raises UsageError (unknown format) or BrokenRule (limits).
    """
    ids = {name: number for number, name in format_names().items()}
    unknown = sorted(set(formats) - set(ids))
    if unknown:
        raise UsageError(f"unknown expert format {unknown[0]!r}: expected one of {', '.join(ids)}")
    offset = header_size(len(formats))
    header = PackHeader(offset, LAYOUT, len(formats), hidden_size, moe_intermediate_size, layer, 0, ())
    sizes: dict[str, int] = {}
    experts = []
    for name in formats:
        if name not in sizes:
            sizes[name] = _blob_bytes(name, header)
        experts.append(PackedExpert(ids[name], offset, sizes[name], 0))
        offset += sizes[name]
    header = replace(header, file_bytes=offset, experts=tuple(experts))
    validate(header, "pack header")
    return header


class PackWriter:
    """One pack in the making, under a temporary name beside `path`.

    A context manager: leaving it without an error finishes the pack, with one removes it. The header is
    written last, so that a file cut off at any moment is no pack even under its temporary name.
    Raises ResourceError when the disk is full, KTError when the target cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layer: int,
        hidden_size: int,
        moe_intermediate_size: int,
        formats: Sequence[str],
    ) -> None:
        self.path = Path(path)
        self.header = plan_header(
            layer=layer,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            formats=formats,
        )
        self._checksums: list[int | None] = [None] * self.header.num_experts
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._descriptor: int | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._descriptor = os.open(self._temporary, flags, 0o666)
        except OSError as error:
            raise _translate(error, self.path) from error

    def write(self, expert: int, blob: Any) -> None:
        """blob: contiguous bytes-like of exactly the planned size; each expert once."""
        view = memoryview(blob).cast("B")
        entry = self.header.experts[expert]
        if len(view) != entry.bytes or self._checksums[expert] is not None:
            raise ValueError(f"expert {expert}: {len(view)} bytes, expected {entry.bytes}, once")
        try:
            _write_all(self._open_descriptor(), view, entry.offset)
        except OSError as error:
            raise _translate(error, self.path) from error
        self._checksums[expert] = xxhash.xxh3_64_intdigest(view)

    def finish(self) -> PackHeader:
        """Writes the header, flushes the file to disk and renames it. Every expert must be there."""
        missing = [index for index, checksum in enumerate(self._checksums) if checksum is None]
        if missing:
            raise ValueError(f"{self.path}: expert {missing[0]} was not written")
        pairs = zip(self.header.experts, self._checksums, strict=True)
        experts = tuple(replace(expert, xxh3_64=checksum or 0) for expert, checksum in pairs)
        self.header = replace(self.header, experts=experts)
        try:
            descriptor = self._open_descriptor()
            _write_all(descriptor, memoryview(header_bytes(self.header)), 0)
            os.fsync(descriptor)
            self._close()
            os.replace(self._temporary, self.path)
            _flush_directory(self.path.parent)
        except OSError as error:
            raise _translate(error, self.path) from error
        return self.header

    def discard(self) -> None:
        """Removes what was written, unless the pack is finished; safe to call again."""
        self._close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise ValueError(f"{self.path}: the pack is already finished or discarded")
        return self._descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def __enter__(self) -> "PackWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.discard()


def _blob_bytes(name: str, header: PackHeader) -> int:
    try:
        return int(_kernels.expert_bytes(name, header.hidden_size, header.moe_intermediate_size))
    except (ValueError, TypeError, OverflowError):
        return 0  # sizes out of limits: validate() says which


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _translate(error: OSError, path: Path) -> KTError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{path}: the disk is full; free some space and run again")
    return KTError(f"{path}: cannot be written: {error.strerror or error}")
