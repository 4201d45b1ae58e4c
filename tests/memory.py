"""Peak memory of a process. Not ru_maxrss: it survives exec, so a child starts with its parent's peak."""

import resource
from pathlib import Path


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
