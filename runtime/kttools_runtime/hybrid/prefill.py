"""Which experts of a chunk of prompt the CPU computes, and which are streamed to the device.

The CPU reads an expert's weights from RAM and multiplies; the device gets them over the bus and multiplies
faster. Experts with many rows gain most, so that they go first. What each side costs is measured once on a
machine and kept in the cache directory.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kttools_runtime import env, strict_json
from kttools_runtime.errors import CorruptFileError, UsageError
from kttools_runtime.moe import RoutedExperts

from .feed import ExpertFeed
from .gating import Gating
from .hot import PLAIN, ExpertSum, gated
from .untile import PackFile

if TYPE_CHECKING:
    from .mixture import Choice

POLICIES = ("auto", "cpu", "gpu")
# Chunks below this stay on the CPU with auto: streaming an expert for a few rows never pays.
LEAST_TOKENS = 32
FEW_ROWS, MANY_ROWS = 8, 256
FED_EXPERTS = 4  # of a measurement on the device: the first copy alone is not hidden
FIELDS = ("cpu_expert_s", "cpu_row_s", "device_expert_s", "device_row_s")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Seconds of an expert with no rows, and of a row, on both sides."""

    cpu_expert_s: float
    cpu_row_s: float
    device_expert_s: float
    device_row_s: float

    def device_share(self, rows: Sequence[int]) -> int:
        """How many of the experts, most rows first, the device should take: the later side ends soonest."""
        cpu = sum(self.cpu_expert_s + count * self.cpu_row_s for count in rows)
        device, best, best_s = 0.0, 0, cpu
        for taken, count in enumerate(rows, 1):
            cpu -= self.cpu_expert_s + count * self.cpu_row_s
            device += self.device_expert_s + count * self.device_row_s
            if max(cpu, device) < best_s:
                best, best_s = taken, max(cpu, device)
        return best


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """cpu_ids: int64 [T, k], -1 for what the device computes; device_experts: those."""

    cpu_ids: Tensor
    device_experts: tuple[int, ...]


class Prefill:
    """The policy of one layer. pack: its experts' file. threads, isa: of the engine, for the calibration.

    feed: of the layer's device.
    """

    def __init__(
        self,
        policy: str,
        pack: PackFile,
        dtype: torch.dtype,
        threads: int,
        isa: str,
        feed: ExpertFeed,
        gating: Gating = PLAIN,
    ) -> None:
        if policy not in POLICIES:
            raise UsageError(f"prefill must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.policy = policy
        self.pack = pack
        self.dtype = dtype
        self.engine = (threads, isa)
        self.feed = feed
        self.gating = gating

    def plan(self, experts: RoutedExperts, ids: Tensor) -> PrefillPlan:
        """ids int64 [T, k] on the device, -1: none."""
        if self.policy == "cpu" or (self.policy == "auto" and ids.shape[0] < LEAST_TOKENS):
            return PrefillPlan(ids, ())
        counts = torch.bincount(ids[ids >= 0], minlength=self.pack.header.num_experts)
        order = counts.argsort(descending=True, stable=True)
        order = order[: int((counts > 0).sum())]
        taken = len(order)
        if self.policy == "auto":
            taken = self._calibration(experts, ids.device).device_share(counts[order].tolist())
        chosen = order[:taken]
        is_taken = torch.zeros(len(counts) + 1, dtype=torch.bool, device=ids.device)
        is_taken[chosen] = True  # the last place stands for ids of -1
        return PrefillPlan(ids.masked_fill(is_taken[ids], -1), tuple(chosen.tolist()))

    def on_device(self, experts: RoutedExperts, x: Tensor, choice: "Choice", plan: PrefillPlan) -> Tensor:
        """What the streamed experts add; two of them are on the device at a time."""
        count = self.pack.header.num_experts
        total = ExpertSum(x, choice.ids, choice.weights, count, self.dtype, self.gating)
        self.feed.run(self.pack, plan.device_experts, total.add)
        return total.out

    def _calibration(self, experts: RoutedExperts, device: torch.device) -> Calibration:
        header = self.pack.header
        shape = [header.formats[0], header.hidden_size, header.moe_intermediate_size, str(self.dtype)]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "simulated"
        key = [platform.machine(), platform.node(), os.cpu_count(), *self.engine, name, *shape]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        path = env.cache_dir() / f"prefill-{digest}.json"
        known = read_calibration(path)
        if known is None:
            known = measure(experts, self.pack, self.feed, self.dtype)
            write_calibration(path, known)
        return known


def measure(experts: RoutedExperts, pack: PackFile, feed: ExpertFeed, dtype: torch.dtype) -> Calibration:
    """Both sides with few and with many rows of an expert, the better of two runs each."""
    hidden = pack.header.hidden_size

    def line(run: Any) -> tuple[float, float]:
        few, many = (min(run(rows) for _ in range(2)) for rows in (FEW_ROWS, MANY_ROWS))
        row = max(many - few, 0.0) / (MANY_ROWS - FEW_ROWS)
        return max(few - FEW_ROWS * row, 0.0), row

    def on_cpu(rows: int) -> float:
        x = torch.ones(rows, hidden, dtype=experts.input_dtype)
        ids, weights = torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1)
        start = time.perf_counter()
        experts.layer.forward(x, ids, weights)
        return time.perf_counter() - start

    def on_device(rows: int) -> float:
        x = torch.ones(rows, hidden, device=feed.device)
        fed = range(min(FED_EXPERTS, pack.header.num_experts))
        start = time.perf_counter()
        feed.run(pack, fed, lambda _, codes: gated(x, codes, dtype))
        return (time.perf_counter() - start) / len(fed)

    return Calibration(*line(on_cpu), *line(on_device))


def read_calibration(path: Path) -> Calibration | None:
    """What an earlier run measured; None where there is nothing, or nothing that makes sense."""
    try:
        values = strict_json.parse(path.read_bytes(), str(path))
    except (OSError, CorruptFileError):
        return None
    if not isinstance(values, dict) or set(values) != set(FIELDS):
        return None
    numbers = [values[name] for name in FIELDS]
    if not all(isinstance(n, float) and 0 <= n < 3600 for n in numbers):
        return None
    return Calibration(*numbers)


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Beside the target, then renamed. A cache that cannot be written is no error: it is measured again."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(asdict(calibration)), encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
