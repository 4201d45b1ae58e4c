"""Peak memory of a process. Not ru_maxrss: it survives exec, so a child starts with its parent's peak."""

import re
import resource
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_rss_bytes() -> int:
    """The high-water mark of this process's own address space (Linux: VmHWM), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def anonymous_bytes() -> int:
    """What this process holds in RAM now beside mapped files (Linux: RssAnon), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def resident_bytes() -> int:
    """What this process holds in RAM now, mapped files included, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def mapped(pid: int | str, suffix: str, proc: Path = Path("/proc")) -> dict[str, int]:
    """Sums over a process's mappings of files that end so, in bytes, by smaps's names of the fields."""
    sums = dict.fromkeys(("Rss", "Pss", "Private_Dirty", "FilePmdMapped"), 0)
    is_ours = False
    for line in (proc / str(pid) / "smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = line.endswith(suffix)
        name, _, value = line.partition(":")
        if is_ours and name in sums:
            sums[name] += int(value.split()[0]) * 1024
    return sums


class PeakBytes(TorchDispatchMode):
    """The most bytes of torch's tensors alive at once that were made inside this `with`; .bytes behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._live = 0
        self._tensors: dict[int, set[int]] = {}  # of every storage made here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self._follow(tensor, _place(tensor) not in given)
        return out

    def _follow(self, tensor: torch.Tensor, is_new: bool) -> None:
        key, size = _place(tensor), tensor.untyped_storage().nbytes()
        if key not in self._tensors:
            if not is_new:
                return  # a view of what was there before
            self._tensors[key] = set()
            self._live += size
            self.bytes = max(self.bytes, self._live)
        if id(tensor) not in self._tensors[key]:
            self._tensors[key].add(id(tensor))
            weakref.finalize(tensor, self._forget, key, id(tensor), size)

    def _forget(self, key: int, tensor: int, size: int) -> None:
        held = self._tensors.get(key, set())
        held.discard(tensor)
        if not held and self._tensors.pop(key, None) is not None:
            self._live -= size


def _place(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
