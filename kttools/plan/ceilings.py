"""Where the ceilings of a roofline come from: given, measured now, remembered, or assumed; each says which.

What `plan` or `bench experts` measured on this machine is kept in the cache directory, so that a plan need
not measure again and `doctor` can show it.
"""

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from kttools.bench.roofline import Ceilings
from kttools.bundle.atomic import atomic_write_bytes
from kttools.dirs import cache_dir

FILE_NAME = "ceilings.json"
KEPT_SECONDS = 30 * 86400.0
# A GPU that is described, not here: the 24 GB card most of these machines have (GeForce RTX 4090, its maker's
# sheet: 1008 GB/s, 165 dense TFLOPS with bf16 input and float32 sums).
ASSUMED_GPU = Ceilings(0.0, 1008e9, 165e12)


@dataclass(frozen=True, slots=True)
class Sourced:
    """Ceilings and where each number is from, in words."""

    ceilings: Ceilings
    bandwidth_source: str
    compute_source: str

    @property
    def source(self) -> str:
        """Both in a few words."""
        same = self.bandwidth_source == self.compute_source
        return self.bandwidth_source if same else f"{self.bandwidth_source}, {self.compute_source}"


def merged(bandwidth: float | None, tops: float | None, other: Sourced) -> Sourced:
    """As given (GB/s, 10^12 operations a second), else as `other` has them."""
    found = other.ceilings
    return Sourced(
        Ceilings(
            found.at,
            found.bandwidth_bytes_s if bandwidth is None else bandwidth * 1e9,
            found.compute_ops_s if tops is None else tops * 1e12,
        ),
        other.bandwidth_source if bandwidth is None else "given",
        other.compute_source if tops is None else "given",
    )


def remember(key: str, ceilings: Ceilings, file: Path | None = None) -> None:
    """Keeps a measurement; a cache that cannot be written is no error."""
    path = file or cache_dir() / FILE_NAME
    entries = _read(path)
    entries[key] = [time.time(), ceilings.bandwidth_bytes_s, ceilings.compute_ops_s]
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, json.dumps(entries, indent=1, sort_keys=True).encode())


def recall(key: str, file: Path | None = None) -> Sourced | None:
    """A measurement of the last 30 days, or None."""
    entry = _read(file or cache_dir() / FILE_NAME).get(key)
    if entry is None or not 0 <= time.time() - entry[0] <= KEPT_SECONDS:
        return None
    when = time.strftime("measured here on %Y-%m-%d", time.localtime(entry[0]))
    return Sourced(Ceilings(0.0, entry[1], entry[2]), when, when)


def remembered(file: Path | None = None) -> dict[str, Sourced]:
    """What was measured on this CPU in the last 30 days, by "threads; numa; arithmetic"."""
    path, cpu = file or cache_dir() / FILE_NAME, f"{_cpu_name()}; "
    found = {key: recall(key, path) for key in sorted(_read(path)) if key.startswith(cpu)}
    return {key.removeprefix(cpu): entry for key, entry in found.items() if entry is not None}


def machine_key(threads: int, numa: str, compute_format: str) -> str:
    """What a measurement depends on: this CPU, how many threads, nodes and arithmetic."""
    return f"{_cpu_name()}; {threads} threads; numa {numa}; {compute_format}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown CPU"


def _read(path: Path) -> dict[str, list[float]]:
    """Entries that are what they should be; anything else was never there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {key: entry for key, entry in entries if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 3 and all(type(n) is float and n > 0 for n in entry)
