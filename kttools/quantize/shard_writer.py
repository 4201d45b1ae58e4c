"""Writes a safetensors file as a stream: the header first, then rows of any tensor at their places."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kttools.bundle.atomic import replacing

from .shard_layout import ShardFile, StoredTensor


class ShardWriter:
    """A shard in the making. write() may be called from any thread; nothing is collected in memory."""

    def __init__(self, descriptor: int, shard: ShardFile) -> None:
        self._descriptor = descriptor
        self._offsets = shard.offsets

    def write(self, part: StoredTensor, first_row: int, values: np.ndarray) -> None:
        """values: C-contiguous rows [first_row, ...) of `part`. Raises OSError."""
        row_bytes = part.bytes // part.shape[0]
        if values.nbytes != row_bytes * values.shape[0] or first_row + values.shape[0] > part.shape[0]:
            got = f"{values.shape} of {values.dtype} at row {first_row}"
            raise ValueError(f"{part.name}: {part.dtype} {part.shape} cannot take {got}")
        offset = self._offsets[part.name] + first_row * row_bytes
        _write_all(self._descriptor, values.data.cast("B"), offset)


@contextlib.contextmanager
def open_shard(path: Path, shard: ShardFile) -> Iterator[ShardWriter]:
    """A writer whose file gets its name when the block ends well, and is removed otherwise.

    Raises ResourceError when the disk is full, KTError when the target cannot be written.
    """
    with replacing(path) as temporary:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o666)
        try:
            _write_all(descriptor, memoryview(shard.header), 0)
            yield ShardWriter(descriptor, shard)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
