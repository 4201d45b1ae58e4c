"""The roofline: the two ceilings of this machine, measured around the rows, and the time they allow.

A virtual machine's clock drifts by a fifth within minutes, so the ceilings are measured again before, between
and after the rows, with the engine's own threads, and every call is held against the measurement nearest in
time.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kttools_runtime import _kernels

COMPUTE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Ceilings:
    """at: time.monotonic() of the measurement."""

    at: float
    bandwidth_bytes_s: float
    compute_ops_s: float


def floor_s(ceilings: Ceilings, weight_bytes: float, operations: float) -> float:
    """Seconds that no engine on this machine can beat: reading the weights, or multiplying."""
    return max(weight_bytes / ceilings.bandwidth_bytes_s, operations / ceilings.compute_ops_s)


def nearest(log: Sequence[Ceilings], at: float) -> Ceilings:
    """The measurement closest to `at`."""
    return min(log, key=lambda ceilings: abs(ceilings.at - at))


class CeilingLog:
    """Measures the ceilings again and again over the same memory, which must fit in no cache."""

    def __init__(self, engine: _kernels.Engine, memory: Any, compute_format: str) -> None:
        self._engine = engine
        self._memory = memory
        self._format = compute_format
        self.entries: list[Ceilings] = []

    def measure(self) -> Ceilings:
        """One more entry: 8 readings of the memory and 0.2 s of dot products."""
        start = time.monotonic()
        bandwidth = _kernels.measure_bandwidth(self._engine, self._memory)
        compute = _kernels.measure_compute(self._engine, COMPUTE_SECONDS, self._format)
        entry = Ceilings((start + time.monotonic()) / 2, bandwidth, compute)
        self.entries.append(entry)
        return entry

    def floor_s(self, at: float, weight_bytes: float, operations: float) -> float:
        """Floor of a call that ran at `at`, by the nearest entry."""
        return floor_s(nearest(self.entries, at), weight_bytes, operations)
