"""RAM: what is free for one more model, inside a container too, and what this process holds. Linux."""

import os
import re
from pathlib import Path

ROOT = Path("/")
NO_LIMIT_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63
# Where a limit and a usage stand, by cgroup version: (folder below sys/fs/cgroup, limit, usage).
_FILES = (
    ("", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_CACHE_KEYS = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")


def available_bytes(root: Path = ROOT) -> int:
    """RAM that can be had without swapping: the kernel's own estimate, at most what the cgroups of this
    process leave.

    Page cache counts as free, so packs that another run left there do not count twice. root: where proc/ and
    sys/ are (a test's own tree).
    """
    free = meminfo_bytes(_read(root / "proc/meminfo"), "MemAvailable")
    return max(0, min([free, *_cgroup_headroom(root)]))


def limit_bytes(root: Path = ROOT) -> int | None:
    """The tightest memory limit of this process's cgroups, None without one."""
    return min((limit for _, limit, _ in _limits(root)), default=None)


def resident_bytes(root: Path = ROOT) -> int:
    """What this process holds in RAM now, libraries and mapped files included."""
    fields = _read(root / "proc/self/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def meminfo_bytes(text: str, name: str) -> int:
    """One line of /proc/meminfo in bytes; 0 when it is not there."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.M)
    return int(match[1]) * 1024 if match else 0


def _cgroup_headroom(root: Path) -> list[int]:
    """What each limit leaves: limit - usage + page cache, which the kernel gives back."""
    left = []
    for folder, limit, usage in _limits(root):
        stat = dict(re.findall(r"^(\w+) (\d+)$", _read(folder / "memory.stat"), re.M))
        is_total = "total_inactive_file" in stat  # v1: without it, below this group alone
        keys = [key for key in _CACHE_KEYS if key.startswith("total_") == is_total]
        cache = sum(int(stat.get(key, 0)) for key in keys)
        left.append(limit - max(0, usage - cache))
    return left


def _limits(root: Path) -> list[tuple[Path, int, int]]:
    """(folder, limit, usage) of this process's memory cgroup and those above it, where there is a limit."""
    found = []
    for below, limit_name, usage_name in _FILES:
        base = root / "sys/fs/cgroup" / below
        for folder in _folders(base, _own_path(root, below)):
            limit, usage = (_read(folder / name).strip() for name in (limit_name, usage_name))
            if limit.isdecimal() and int(limit) < NO_LIMIT_BYTES:
                found.append((folder, int(limit), int(usage) if usage.isdecimal() else 0))
    return found


def _own_path(root: Path, controller: str) -> str:
    """This process's cgroup below the hierarchy's root ("" in a container that sees its own as the root)."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if controller in names.split(","):
            return path.strip("/")
    return ""


def _folders(base: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part not in ("", "..", ".")]
    return [base.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
