"""Weights in pages of 2 MiB: fewer TLB misses, and 2 MiB at a time from disk.

Linux keeps a file's pages in folios of the size they were brought in with, and maps one of 2 MiB with one
entry. Ext4 (from Linux 6.16), XFS and Btrfs do so; elsewhere every request here is refused or ignored, and
nothing changes but speed. What is in the cache already keeps its size until it is evicted.
"""

import contextlib
import mmap

import numpy as np
import torch

from .errors import ResourceError

HUGE_PAGE = 2 << 20
# Below this the two huge pages that a fault brings in are more than what is asked for.
LEAST_FILE_BYTES = 64 << 20


def ask_for_huge_pages(mapping: mmap.mmap) -> None:
    """Pages that are not in memory yet come in huge pages from now on, where the file system can."""
    if len(mapping) >= LEAST_FILE_BYTES:
        _advise(mapping)


def huge_memory(size: int) -> np.ndarray:
    """uint8 [size], zero, on a 2 MiB boundary; huge pages are asked for. Raises ResourceError."""
    try:
        # Private: shared memory gets no huge pages on most systems.
        mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ResourceError(f"cannot map {size >> 20} MiB: {error}") from None
    _advise(mapping)
    raw = np.frombuffer(mapping, dtype=np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE
    return raw[start : start + size]


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, on the CPU in huge pages if it fills some. Raises ResourceError."""
    if tensor.device.type != "cpu" or tensor.nbytes < 2 * HUGE_PAGE:
        return tensor.contiguous()
    memory = torch.from_numpy(huge_memory(tensor.nbytes)).view(tensor.dtype).view(tensor.shape)
    return memory.copy_(tensor)


def _advise(mapping: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them says EINVAL
            mapping.madvise(mmap.MADV_HUGEPAGE)
