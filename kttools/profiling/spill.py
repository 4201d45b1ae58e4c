"""Hidden states of many windows in bounded RAM: a list while they are few, else a mapped file without a name.

Its pages are the page cache's: the system drops and reads them again as it needs memory. float32 goes in and
comes out bit for bit.
"""

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kttools_runtime.errors import ResourceError

HELD_BYTES = 256 << 20  # up to here RAM is the simpler place
Rows = Sequence[Tensor]


def hold(made: Iterable[Tensor], rows: int, width: int, folder: Path | None = None) -> Rows:
    """The tensors [*, width] float32, `rows` in all, kept as they are made; treat them as read-only.

    folder: where the file goes (default: the system's for temporary files); it vanishes with the process.
    Raises ResourceError when the disk has no room for it.
    """
    size = 4 * rows * width
    if size <= HELD_BYTES:
        return list(made)
    place = Path(tempfile.gettempdir()) if folder is None else folder
    place.mkdir(parents=True, exist_ok=True)
    _check_room(place, size)
    with tempfile.TemporaryFile(dir=place) as file:
        try:
            lengths = [_append(file, tensor) for tensor in made]
            file.flush()
        except OSError as error:
            raise ResourceError(f"{place}: hidden states: {error.strerror}") from error
        # Private: a writable map without a writable file, which is what a tensor wants to see.
        mapping = mmap.mmap(
            file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    return torch.frombuffer(mapping, dtype=torch.float32).view(-1, width).split(lengths)


def _append(file: BinaryIO, tensor: Tensor) -> int:
    """Writes one window; the number of its rows. Its pages go to the disk now, not when memory is short."""
    file.write(tensor.detach().cpu().to(torch.float32).contiguous().numpy().data)
    file.flush()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return tensor.shape[0]


def _check_room(place: Path, size: int) -> None:
    free = shutil.disk_usage(place).free
    if size > free:
        raise ResourceError(
            f"{place}: {size / 2**30:.1f} GiB of disk needed for hidden states, {free / 2**30:.1f} GiB free; "
            "give fewer --eval-tokens"
        )
