"""Spreading memory over the nodes of a machine, page by page (Linux set_mempolicy(2) by number).

The engine binds the strips of experts to nodes itself; a dense matrix is read whole by the workers of all
nodes, so its pages are interleaved: every node's memory gives its share of the bandwidth. A wish, like all
placement here: where the system refuses (a container), pages lie where they are first written.
"""

import ctypes
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MPOL_INTERLEAVE = 3
MAX_NODES = 1024  # of Linux
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
_Mask = ctypes.c_ulong * (MAX_NODES // _WORD_BITS)
# (set_mempolicy, get_mempolicy) by machine
_CALLS = {"x86_64": (238, 239), "aarch64": (237, 236)}
_NODES_WITH_CPUS = Path("/sys/devices/system/node/has_cpu")


@contextmanager
def interleaved(nodes: int) -> Iterator[bool]:
    """Pages that this thread writes first go round the memory nodes that have CPUs; then the policy before.

    nodes: in use; with one nothing is done. Yields whether the system agreed.
    """
    calls = _CALLS.get(platform.machine())
    ids = nodes_with_cpus() if nodes > 1 and calls else []
    before = _policy() if ids else None
    is_set = before is not None and _set(MPOL_INTERLEAVE, _mask(ids))
    try:
        yield is_set
    finally:
        if is_set and before is not None:
            _set(*before)


def nodes_with_cpus(file: Path = _NODES_WITH_CPUS) -> list[int]:
    """Numbers of the memory nodes that have CPUs; [] where the system does not say."""
    try:
        text = file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    found: list[int] = []
    for first, last in re.findall(r"(\d{1,4})(?:-(\d{1,4}))?", text):
        found.extend(range(int(first), int(last or first) + 1))
    return [node for node in found if node < MAX_NODES]


def _mask(ids: list[int]) -> "ctypes.Array[ctypes.c_ulong]":
    mask = _Mask()
    for node in ids:
        mask[node // _WORD_BITS] |= 1 << (node % _WORD_BITS)
    return mask


def _set(mode: int, mask: "ctypes.Array[ctypes.c_ulong]") -> bool:
    return _syscall(_CALLS[platform.machine()][0], mode, mask, MAX_NODES + 1) == 0


def _policy() -> "tuple[int, ctypes.Array[ctypes.c_ulong]] | None":
    """(mode, mask) of this thread, None when the system will not say."""
    mode, mask = ctypes.c_int(), _Mask()
    number = _CALLS[platform.machine()][1]
    if _syscall(number, ctypes.byref(mode), mask, MAX_NODES, None, 0) != 0:
        return None
    return mode.value, mask


def _syscall(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return int(libc.syscall(ctypes.c_long(number), *words))
