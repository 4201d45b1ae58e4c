"""How the expert weights of a bundle are shared between the memory nodes of a machine."""

from dataclasses import dataclass

from . import _kernels, env
from .errors import UsageError

NUMA_MODES = ("auto", "off", "shard", "replicate")


@dataclass(frozen=True, slots=True)
class NumaPlan:
    """mode: off, shard or replicate. node_bytes: of expert packs, read (replicate: held) by each node."""

    mode: str
    node_bytes: tuple[int, ...]

    @property
    def copied_bytes(self) -> int:
        """Memory taken beside the mapped packs."""
        return sum(self.node_bytes) if self.mode == "replicate" and len(self.node_bytes) > 1 else 0

    def line(self) -> str:
        """The plan in a line."""
        sizes = ", ".join(f"node {i}: {size / 1e9:.2f} GB" for i, size in enumerate(self.node_bytes))
        extra = f"; {self.copied_bytes / 1e9:.2f} GB of RAM for the copies" if self.copied_bytes else ""
        return f"NUMA {self.mode}: {sizes} of expert weights{extra}"


def engine_mode(numa: str) -> str:
    """What the engine is told: on one node its shard is off. Raises UsageError for an unknown name."""
    if numa not in NUMA_MODES:
        raise UsageError(f"numa must be one of {', '.join(NUMA_MODES)}, got {numa!r}")
    return "shard" if numa == "auto" else numa


def resolve_mode(numa: str, nodes: int) -> str:
    """off, shard or replicate for what was asked. Raises UsageError for an unknown name."""
    mode = engine_mode(numa)
    return "off" if numa == "auto" and nodes == 1 else mode


def share_nodes(total: int, numa: str, threads: int | None, nodes: int = 0) -> NumaPlan:
    """What load() does with `total` bytes of expert packs. nodes: of the machine; 0: those of this one."""
    available = nodes or len(_kernels.numa_nodes())
    mode = resolve_mode(numa, available)
    workers = env.default_threads() if threads is None else threads
    used = 1 if mode == "off" else min(available, workers)
    if mode == "replicate":
        return NumaPlan(mode, (total,) * used)
    return NumaPlan(mode, tuple(total * len(range(node, workers, used)) // workers for node in range(used)))
