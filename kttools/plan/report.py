"""A plan as text and as JSON (schema: schemas/plan.schema.json)."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kttools.bundle.render import size
from kttools_runtime.device_footprint import (
    CONTEXT_BYTES,
    GRAPH_LAYER_BYTES,
    DeviceFootprint,
    kept_blocks_bytes,
)

from .ceilings import Sourced
from .choice import Choice
from .layout import Layout
from .memory import Machine, Needs
from .speed import Speed

UNKNOWN_READ = "not known: no weights beside config.json (embedding and norms taken as bf16)"


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a plan says. name: of the model, for a bundle's directory; disk_bytes_s: given or assumed.

    hot_speed: with all the experts on the GPUs that fit, None without GPUs or room; speed: as planned.
    """

    model: str
    name: str
    path: Path
    is_bundle: bool
    choice: Choice
    layout: Layout
    machine: Machine
    device_names: tuple[str, ...]
    needs: Needs
    speed: Speed
    hot_speed: Speed | None
    cpu: Sourced
    gpu: Sourced | None
    ram_source: str
    vram_source: str
    disk_bytes_s: float

    @property
    def fits(self) -> bool:
        return self.needs.fits(self.machine)

    @property
    def load_s(self) -> float:
        """Shards are read, packs are paged in."""
        return (self.layout.shard_bytes + self.layout.pack_bytes) / self.disk_bytes_s

    def commands(self) -> list[str]:
        """What to run: quantize unless MODEL is a bundle, then chat."""
        choice, bundle, lines = self.choice, self.model, []
        if not self.is_bundle:
            bundle = f"{self.name}-{choice.cpu_format}"
            formats = ["--cpu-format", str(choice.cpu_format), "--gpu-format", str(choice.gpu_format)]
            lines.append(["kttools", "quantize", self.model, "-o", bundle, *formats])
        options = ["--cache_lens", str(choice.cache_len), "-t", str(choice.threads), "--numa", choice.numa]
        if self.device_names:
            options += ["--device", ",".join(self.device_names)]
        if self.needs.hot and choice.gpu_experts is not None:
            options += ["--gpu-experts", choice.gpu_experts.text]
        lines.append(["kttools", "chat", bundle, *options])
        return [shlex.join(line) for line in lines]

    def assumptions(self) -> list[str]:
        """What is neither read nor measured, and where it is from."""
        found = [
            "scratch: estimated from the shapes of one chunk of prompt",
            f"process: {size(self.needs.libraries)} of this one, {size(self.needs.ram.process)} for code,"
            " tokenizer and what a GPU's driver takes in RAM",
            f"disk: {self.disk_bytes_s / 1e9:g} GB/s (--disk)",
        ]
        if self.needs.devices:
            found += [
                f"CUDA context and libraries: {size(CONTEXT_BYTES)} a GPU, an allowance",
                f"graph: {size(GRAPH_LAYER_BYTES)} a layer, an allowance",
                self._choices(),
                *self._blocks(),
            ]
        return found

    def _blocks(self) -> list[str]:
        """What GGUF's blocks become on a GPU, and what takes less there."""
        held = kept_blocks_bytes(self.layout.tensors)
        if not held:
            return []
        return [
            f"linears in GGUF's blocks: int8 on a GPU, {size(held)}; shards of --gpu-format int4 take half"
        ]

    def _choices(self) -> str:
        """How often the hot experts are supposed to be chosen."""
        asked = self.choice.gpu_experts
        if asked is None or not asked.counts:
            return "hot experts: every expert chosen alike (--gpu-experts auto:PROFILE does better)"
        return f"hot experts: chosen as often as in the text of {asked.file}"


def to_dict(report: Report) -> dict[str, Any]:
    """For --json; bytes, seconds, tokens per second."""
    layout, need, speed = report.layout, report.needs, report.speed
    ram = need.ram
    return {
        "model": report.model,
        "cpu_format": report.choice.cpu_format,
        "gpu_format": report.choice.gpu_format,
        "cache_lens": report.choice.cache_len,
        "threads": report.choice.threads,
        "read_bytes": layout.read_bytes,
        "bundle_bytes": {
            "total": layout.bundle_bytes,
            "experts": layout.pack_bytes,
            "shards": layout.shard_bytes,
            "tokenizer": layout.tokenizer_bytes,
        },
        "expert_format_bytes": layout.bytes_by_format,
        "ram_bytes": {
            "total": need.ram_total,
            "experts_mapped": ram.experts,
            "experts_copied": ram.copies,
            "dense": ram.dense,
            "cache": ram.cache,
            "scratch_estimate": ram.scratch,
            "process": need.process,
        },
        "numa": {
            "mode": ram.numa.mode,
            "node_bytes": list(need.node_bytes()),
            "node_expert_bytes": list(ram.numa.node_bytes),
        },
        "ram_limit_bytes": report.machine.ram_bytes,
        "ram_limit_source": report.ram_source,
        "devices": [
            _device(name, device, limit)
            for name, device, limit in zip(
                report.device_names, need.devices, report.machine.vram, strict=True
            )
        ],
        "gpu_experts": _gpu_experts(report),
        "fits": report.fits,
        "load_s": report.load_s,
        "disk_bytes_s": report.disk_bytes_s,
        "upper_bounds": _bounds(speed) | _sources(report),
        "assumptions": report.assumptions(),
        "commands": report.commands(),
    }


def _device(name: str, device: DeviceFootprint, limit: int) -> dict[str, Any]:
    return {
        "device": name,
        "layers": list(device.layers),
        "limit_bytes": limit,
        "total_bytes": device.total,
        "weight_bytes": dict(sorted(device.weights.items())),
        "cache_bytes": device.cache,
        "workspace_estimate_bytes": device.workspace,
        "graph_allowance_bytes": device.graph,
        "context_allowance_bytes": device.context,
        "hot_expert_bytes": device.hot_experts,
    }


def _gpu_experts(report: Report) -> dict[str, Any] | None:
    if not report.needs.devices:
        return None
    gained = None if report.hot_speed is None else report.hot_speed.decode_tokens_s
    return {
        "per_layer": _per_layer(report, report.needs.hot),
        "most_per_layer": _per_layer(report, report.needs.most_hot),
        "hit_share": report.needs.hot_share,
        "most_hit_share": report.needs.most_share,
        "most_decode_tokens_s": gained,
    }


def _per_layer(report: Report, count: int) -> float:
    """The mean over MoE layers, with two digits behind the point."""
    return math.floor(100 * count / max(1, len(report.layout.config.moe_layers))) / 100


def _bounds(speed: Speed) -> dict[str, Any]:
    return {
        "bandwidth_bytes_s": speed.ceilings.bandwidth_bytes_s,
        "compute_ops_s": speed.ceilings.compute_ops_s,
        "gpu_bandwidth_bytes_s": None if speed.gpu is None else speed.gpu.bandwidth_bytes_s,
        "gpu_compute_ops_s": None if speed.gpu is None else speed.gpu.compute_ops_s,
        "decode_expert_bytes": speed.expert_bytes,
        "decode_dense_bytes": speed.dense_bytes,
        "decode_full_cache_bytes": speed.cache_bytes,
        "decode_tokens_s": speed.decode_tokens_s,
        "decode_full_cache_tokens_s": speed.full_cache_tokens_s,
        "prefill_ops_per_token": speed.token_ops,
        "prefill_chunk_tokens": speed.chunk_tokens,
        "prefill_chunk_bytes": speed.chunk_bytes + speed.dense_bytes,
        "prefill_tokens_s": speed.prefill_tokens_s,
    }


def _sources(report: Report) -> dict[str, Any]:
    return {
        "source": report.cpu.source,
        "gpu_source": None if report.gpu is None else report.gpu.source,
    }


def render(report: Report) -> str:
    """Aligned lines, the commands last."""
    rows = [("model", report.model), *_disk_rows(report), *_ram_rows(report), *_device_rows(report)]
    rows += _speed_rows(report)
    rows += [("assumed" if i == 0 else "", line) for i, line in enumerate(report.assumptions())]
    rows += [("run" if i == 0 else "", line) for i, line in enumerate(report.commands())]
    return "\n".join(f"{name:<18}{value}".rstrip() for name, value in rows)


Rows = list[tuple[str, str]]


def _disk_rows(report: Report) -> Rows:
    layout = report.layout
    rows: Rows = []
    if not report.is_bundle:
        rows.append(("read", size(layout.read_bytes) if layout.read_bytes is not None else UNKNOWN_READ))
    return [
        *rows,
        ("bundle", f"{size(layout.bundle_bytes)} (and a manifest and a report)"),
        ("  expert packs", f"{size(layout.pack_bytes)} in {len(layout.expert_formats)} files"),
        ("  shards", size(layout.shard_bytes)),
        ("  tokenizer", size(layout.tokenizer_bytes)),
    ]


def _ram_rows(report: Report) -> Rows:
    need, ram = report.needs, report.needs.ram
    is_enough = need.ram_total <= report.machine.ram_bytes
    limit = f"{size(report.machine.ram_bytes)} {report.ram_source}"
    nodes = ", ".join(f"node {i} {size(share)}" for i, share in enumerate(need.node_bytes()))
    dense = "embedding, looked up by row" if need.devices else "repacked for the kernels"
    rows = [
        ("RAM", f"{size(need.ram_total)} of {limit}: {'fits' if is_enough else 'does not fit'}"),
        ("  expert packs", f"{size(ram.experts)} mapped, page cache: {_formats(report.layout)}"),
    ]
    if ram.copies:
        rows.append(("  expert copies", f"{size(ram.copies)}, one a node"))
    rows.append(("  dense weights", f"{size(ram.dense)} {dense}"))
    if not need.devices:
        rows.append(("  KV cache", f"{size(ram.cache)} for {report.choice.cache_len} tokens"))
    return [
        *rows,
        ("  scratch", f"{size(ram.scratch)} (estimate)"),
        ("  process", f"{size(need.process)} (libraries, tokenizer)"),
        (f"  NUMA {ram.numa.mode}", nodes),
    ]


def _formats(layout: Layout) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in layout.bytes_by_format.items())


def _device_rows(report: Report) -> Rows:
    rows: Rows = []
    for name, device, limit in zip(
        report.device_names, report.needs.devices, report.machine.vram, strict=True
    ):
        verdict = "fits" if device.total <= limit else "does not fit"
        first, last = device.layers
        weights = ", ".join(f"{kind} {size(count)}" for kind, count in sorted(device.weights.items()))
        rows += [
            (name, f"{size(device.total)} of {size(limit)} {report.vram_source}: {verdict}"),
            ("  weights", f"{size(device.weight_bytes)}: {weights}; layers {first} to {last - 1}"),
            ("  KV cache", f"{size(device.cache)} for {report.choice.cache_len} tokens"),
            ("  workspace", f"{size(device.workspace)} (estimate)"),
            ("  context, graph", f"{size(device.context + device.graph)} (allowance)"),
        ]
        if device.hot_experts:
            rows.append(("  hot experts", f"{size(device.hot_experts)} in int4"))
    if rows and report.hot_speed is not None:
        hot, most = (_per_layer(report, n) for n in (report.needs.hot, report.needs.most_hot))
        gained = f"{rounded(report.hot_speed.decode_tokens_s)} tok/s"
        need = report.needs
        taken = f"{hot:g} a layer, {100 * need.hot_share:.1f} % of choices" if need.hot else "none"
        fitting = f"{most:g} fit, {100 * need.most_share:.1f} %"
        rows.append(("hot experts", f"{taken}; {fitting}: decode at most {gained}"))
    return rows


def _speed_rows(report: Report) -> Rows:
    s, cpu = report.speed, report.speed.ceilings
    rate = f"{report.disk_bytes_s / 1e9:g} GB/s (--disk; not measured)"
    rows = [
        ("load", f"{report.load_s:.1f} s at {rate}, less from the page cache"),
        (
            "ceilings",
            f"{cpu.bandwidth_bytes_s / 1e9:.1f} GB/s, {cpu.compute_ops_s / 1e12:.3g} Tops"
            f" ({report.cpu.source})",
        ),
    ]
    if s.gpu is not None and report.gpu is not None:
        text = f"{s.gpu.bandwidth_bytes_s / 1e9:.1f} GB/s, {s.gpu.compute_ops_s / 1e12:.3g} Tops"
        rows.append(("  of a GPU", f"{text} ({report.gpu.source})"))
    cache = f"{size(s.cache_bytes)} when full"
    chosen, rest = size(s.expert_bytes), size(s.dense_bytes - s.shared_bytes)
    how = f"= bandwidth / ({chosen} chosen experts + {size(s.dense_bytes)} dense + cache, {cache})"
    if s.gpu is not None:
        how = f"= {chosen} chosen experts in RAM beside {size(s.shared_bytes)} shared in VRAM,"
        how += f" then {rest} and cache ({cache}) there"
    return [
        *rows,
        (
            "decode",
            f"at most {rounded(s.decode_tokens_s)} tok/s, {rounded(s.full_cache_tokens_s)} with a full cache",
        ),
        ("", how),
        (
            "prefill",
            f"at most {rounded(s.prefill_tokens_s)} tok/s, {s.chunk_tokens} at a time, every expert chosen",
        ),
        (
            "",
            f"= the slower of {s.token_ops / 1e9:.3g} G operations a token / compute and"
            f" {size(s.chunk_bytes + s.dense_bytes)} a chunk / bandwidth",
        ),
    ]


def rounded(value: float) -> str:
    """Three digits, so that nobody reads more into it."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"
