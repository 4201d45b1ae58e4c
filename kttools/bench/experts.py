"""bench experts: one MoE layer, row by row of token counts, beside its roofline and beside a peer."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kttools.plan.ceilings import machine_key, remember
from kttools_runtime._kernels import available_isas, numa_nodes
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.huge_pages import huge_memory

from .kt_peer import KtKernelPeer
from .layer import RandomLayer, huge_page_share, random_layer
from .roofline import CeilingLog, Ceilings, nearest
from .shapes import LayerShape

# Memory that no cache holds (server parts have up to 480 MiB of L3); a smaller layer cannot be the yardstick.
LEAST_PROBE_BYTES = 2 << 30
# What is measured over less is not kept for `plan` and `doctor`.
PROBE_BYTES = 1 << 30
# Between two engines: the idle workers of one sleep before the other starts (kt-kernel's spin 50 ms).
SETTLE_SECONDS = 0.06


@dataclass(frozen=True, slots=True)
class Call:
    """One timed call. at: time.monotonic() of its start."""

    at: float
    seconds: float
    experts_hit: int


@dataclass(frozen=True, slots=True)
class Row:
    """Calls of one engine with one token count, and what the machine allowed meanwhile."""

    engine: str
    format: str
    isa: str
    threads: int
    shape: LayerShape
    num_tokens: int
    expert_bytes: int
    calls: tuple[Call, ...]
    floors_s: tuple[float, ...]
    ceilings: Ceilings
    ratio: float | None = None  # peer's median over ours, on our rows when a peer ran
    huge_page_share: float | None = None  # of the weights; None: not known
    scratch_bytes: int | None = None  # of our engine behind this row, which only grows; None: a peer

    @property
    def median_s(self) -> float:
        return statistics.median(call.seconds for call in self.calls)

    @property
    def weight_bytes(self) -> float:
        """Read per call, on average over the calls."""
        return self.expert_bytes * statistics.fmean(call.experts_hit for call in self.calls)

    @property
    def roofline_fraction(self) -> float:
        """Median over the calls of floor / time."""
        pairs = zip(self.floors_s, self.calls, strict=True)
        return statistics.median(floor / call.seconds for floor, call in pairs)


def default_repeat(num_tokens: int) -> int:
    """Calls per row: more where a call is short."""
    for most_tokens, calls in ((16, 21), (256, 11), (1024, 7), (4096, 5)):
        if num_tokens <= most_tokens:
            return calls
    return 3


def random_ids(generator: torch.Generator, num_tokens: int, shape: LayerShape) -> torch.Tensor:
    """int64 [num_tokens, top_k]: every row distinct experts, uniformly."""
    keys = torch.rand(num_tokens, shape.num_experts, generator=generator)
    return keys.topk(shape.top_k, dim=1).indices.contiguous()


class OurLayer:
    """The kttools side of a comparison."""

    name = "kttools"

    def __init__(self, engine: ExpertEngine, shape: LayerShape, format: str) -> None:
        self.shape = shape
        self.random: RandomLayer = random_layer(engine, shape, format)
        self.isa = engine.isa
        self.expert_bytes = self.random.expert_bytes
        self.huge_page_share = huge_page_share(self.random.memory)
        self._generator = torch.Generator().manual_seed(1)

    def call(self, num_tokens: int) -> Call:
        """A timed call with fresh ids, behind an untimed one of one token that wakes the workers."""
        self._forward(1)
        return self._forward(num_tokens)

    def _forward(self, num_tokens: int) -> Call:
        shape, generator = self.shape, self._generator
        x = torch.randn(num_tokens, shape.hidden_size, generator=generator).to(torch.bfloat16)
        ids = random_ids(generator, num_tokens, shape)
        weights = torch.rand(num_tokens, shape.top_k, generator=generator)
        out = torch.zeros(num_tokens, shape.hidden_size)  # zeros: its pages are there before the clock starts
        at = time.monotonic()
        start = time.perf_counter()
        self.random.layer.forward(x, ids, weights, out)
        return Call(at, time.perf_counter() - start, int(ids.unique().numel()))


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure; repeat 0 chooses by token count."""

    shape: LayerShape
    format: str
    tokens: tuple[int, ...]
    repeat: int = 0


def run(
    engine: ExpertEngine, plan: Plan, peer: KtKernelPeer | None = None, notice: Callable[[str], None] = print
) -> list[Row]:
    """Rows of ours, each followed by the peer's when there is one. Calls of the two alternate."""
    notice(f"making {plan.shape.num_experts} random {plan.format} experts of shape {plan.shape.name}")
    ours = OurLayer(engine, plan.shape, plan.format)
    if peer is not None:
        notice(f"loading the same shape into {peer.name}")
        peer.load(plan.shape, plan.format, engine.threads, max(plan.tokens))
    memory = ours.random.memory
    if memory.nbytes < LEAST_PROBE_BYTES:
        memory = huge_memory(LEAST_PROBE_BYTES)
        memory[:] = 1
    compute_format = "bf16" if plan.format == "bf16" else "int8"
    log = CeilingLog(engine.native, memory, compute_format)
    log.measure()
    rows: list[Row] = []
    for num_tokens in plan.tokens:
        notice(f"{num_tokens} tokens")
        ours.call(num_tokens)  # scratch of its full size
        repeat = plan.repeat or default_repeat(num_tokens)
        mine, theirs = _alternate(ours, peer, num_tokens, repeat, log)
        log.measure()
        rows.extend(_rows(engine, plan, ours, log, num_tokens, mine, theirs, peer))
    if memory.nbytes >= PROBE_BYTES and engine.isa == available_isas()[0]:
        _keep(log, engine.threads, compute_format)
    return rows


def _keep(log: CeilingLog, threads: int, compute_format: str) -> None:
    """The median for `plan` and `doctor`. On one memory node every mode of placing experts is the same."""
    mode = "auto" if len(numa_nodes()) == 1 else "off"
    bandwidth = statistics.median(entry.bandwidth_bytes_s for entry in log.entries)
    compute = statistics.median(entry.compute_ops_s for entry in log.entries)
    remember(machine_key(threads, mode, compute_format), Ceilings(0.0, bandwidth, compute))


def _alternate(
    ours: OurLayer, peer: KtKernelPeer | None, num_tokens: int, repeat: int, log: CeilingLog
) -> tuple[list[Call], list[Call]]:
    mine, theirs = [], []
    for index in range(repeat):
        if index == repeat // 2:
            log.measure()  # in the middle as well: a row with a peer can take half a minute
        mine.append(ours.call(num_tokens))
        if peer is not None:
            time.sleep(SETTLE_SECONDS)
            at = time.monotonic()
            seconds, experts_hit = peer.call(num_tokens)
            theirs.append(Call(at, seconds, experts_hit))
            time.sleep(SETTLE_SECONDS)
    return mine, theirs


def _rows(
    engine: ExpertEngine,
    plan: Plan,
    ours: OurLayer,
    log: CeilingLog,
    num_tokens: int,
    mine: Sequence[Call],
    theirs: Sequence[Call],
    peer: KtKernelPeer | None,
) -> list[Row]:
    def row(side: OurLayer | KtKernelPeer, calls: Sequence[Call], ratio: float | None = None) -> Row:
        operations = plan.shape.operations(num_tokens)
        floors = tuple(log.floor_s(c.at, c.experts_hit * side.expert_bytes, operations) for c in calls)
        return Row(
            engine=side.name,
            format=plan.format,
            isa=side.isa,
            threads=engine.threads,
            shape=plan.shape,
            num_tokens=num_tokens,
            expert_bytes=side.expert_bytes,
            calls=tuple(calls),
            floors_s=floors,
            ceilings=nearest(log.entries, calls[len(calls) // 2].at),
            ratio=ratio,
            huge_page_share=side.huge_page_share,
            scratch_bytes=engine.native.scratch_bytes if side is ours else None,
        )

    if peer is None:
        return [row(ours, mine)]
    ratio = statistics.median(call.seconds for call in theirs) / statistics.median(c.seconds for c in mine)
    return [row(ours, mine, ratio), row(peer, theirs)]
