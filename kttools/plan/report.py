"""A plan as text and as JSON."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kttools.bundle.render import size

from .choice import Choice
from .layout import Layout
from .memory import RamPlan
from .speed import Speed


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a plan says. ram_limit_bytes: given or available; disk_bytes_s: as given or assumed."""

    model: str
    path: Path
    is_bundle: bool
    choice: Choice
    layout: Layout
    ram: RamPlan
    speed: Speed
    ram_limit_bytes: int
    is_limit_given: bool
    disk_bytes_s: float

    @property
    def fits(self) -> bool:
        return self.ram.total <= self.ram_limit_bytes

    @property
    def load_s(self) -> float:
        """Shards are read, packs are paged in."""
        return (self.layout.shard_bytes + self.layout.pack_bytes) / self.disk_bytes_s

    def commands(self) -> list[str]:
        """What to run: quantize unless MODEL is a bundle, then chat."""
        choice, bundle, lines = self.choice, self.model, []
        if not self.is_bundle:
            bundle = f"{self.path.name.removesuffix('.gguf')}-{choice.cpu_format}"
            formats = ["--cpu-format", str(choice.cpu_format), "--gpu-format", str(choice.gpu_format)]
            lines.append(["kttools", "quantize", self.model, "-o", bundle, *formats])
        options = ["--cache_lens", str(choice.cache_len), "-t", str(choice.threads), "--numa", choice.numa]
        lines.append(["kttools", "chat", bundle, *options])
        return [shlex.join(line) for line in lines]


def to_dict(report: Report) -> dict[str, Any]:
    """For --json; bytes, seconds, tokens per second."""
    layout, ram, speed = report.layout, report.ram, report.speed
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
        "ram_bytes": {
            "total": ram.total,
            "experts_mapped": ram.experts,
            "experts_copied": ram.copies,
            "dense": ram.dense,
            "cache": ram.cache,
            "scratch_estimate": ram.scratch,
            "process": ram.process,
        },
        "numa": {"mode": ram.numa.mode, "node_bytes": list(ram.numa.node_bytes)},
        "ram_limit_bytes": report.ram_limit_bytes,
        "fits": report.fits,
        "load_s": report.load_s,
        "disk_bytes_s": report.disk_bytes_s,
        "upper_bounds": _bounds(speed),
        "commands": report.commands(),
    }


def _bounds(speed: Speed) -> dict[str, Any]:
    return {
        "bandwidth_bytes_s": speed.ceilings.bandwidth_bytes_s,
        "compute_ops_s": speed.ceilings.compute_ops_s,
        "decode_expert_bytes": speed.expert_bytes,
        "decode_dense_bytes": speed.dense_bytes,
        "decode_full_cache_bytes": speed.cache_bytes,
        "decode_tokens_s": speed.decode_tokens_s,
        "decode_full_cache_tokens_s": speed.full_cache_tokens_s,
        "prefill_ops_per_token": speed.token_ops,
        "prefill_chunk_tokens": speed.chunk_tokens,
        "prefill_chunk_bytes": speed.chunk_bytes,
        "prefill_tokens_s": speed.prefill_tokens_s,
    }


def render(report: Report) -> str:
    """Aligned lines, the commands last."""
    rows = [("model", report.model), *_disk_rows(report), *_ram_rows(report), *_speed_rows(report)]
    rows += [("run" if i == 0 else "", line) for i, line in enumerate(report.commands())]
    return "\n".join(f"{name:<18}{value}".rstrip() for name, value in rows)


Rows = list[tuple[str, str]]


def _disk_rows(report: Report) -> Rows:
    layout = report.layout
    rows: Rows = []
    if not report.is_bundle:
        unknown = "not known: no weights beside config.json (embedding and norms taken as bf16)"
        read = size(layout.read_bytes) if layout.read_bytes is not None else unknown
        rows.append(("read", read))
    return [
        *rows,
        ("bundle", f"{size(layout.bundle_bytes)} (and a manifest and a report)"),
        ("  expert packs", f"{size(layout.pack_bytes)} in {len(layout.expert_formats)} files"),
        ("  shards", size(layout.shard_bytes)),
        ("  tokenizer", size(layout.tokenizer_bytes)),
    ]


def _ram_rows(report: Report) -> Rows:
    ram, cache_len = report.ram, report.choice.cache_len
    limit = f"{size(report.ram_limit_bytes)} {'given' if report.is_limit_given else 'available'}"
    nodes = ", ".join(f"node {i} {size(share)}" for i, share in enumerate(ram.numa.node_bytes))
    copied: Rows = [("  expert copies", f"{size(ram.copies)} ({nodes})")] if ram.copies else []
    verdict = "fits" if report.fits else "does not fit"
    return [
        ("RAM", f"{size(ram.total)} of {limit}: {verdict}"),
        ("  expert packs", f"{size(ram.experts)} mapped, page cache (NUMA {ram.numa.mode}: {nodes})"),
        *copied,
        ("  dense weights", f"{size(ram.dense)} repacked"),
        ("  KV cache", f"{size(ram.cache)} for {cache_len} tokens"),
        ("  scratch", f"{size(ram.scratch)} (estimate)"),
        ("  process", f"{size(ram.process)} (libraries, with slack)"),
    ]


def _speed_rows(report: Report) -> Rows:
    s, ceilings = report.speed, report.speed.ceilings
    rate = f"{report.disk_bytes_s / 1e9:g} GB/s (--disk; not measured)"
    return [
        ("load", f"{report.load_s:.1f} s at {rate}, less from the page cache"),
        (
            "ceilings",
            f"{ceilings.bandwidth_bytes_s / 1e9:.1f} GB/s, {ceilings.compute_ops_s / 1e12:.3g} Tops",
        ),
        (
            "decode",
            f"at most {rounded(s.decode_tokens_s)} tok/s, {rounded(s.full_cache_tokens_s)} with a full cache",
        ),
        (
            "",
            f"= bandwidth / ({size(s.expert_bytes)} chosen experts + {size(s.dense_bytes)} dense"
            f" + cache, {size(s.cache_bytes)} when full)",
        ),
        (
            "prefill",
            f"at most {rounded(s.prefill_tokens_s)} tok/s, {s.chunk_tokens} at a time, every expert chosen",
        ),
        (
            "",
            f"= the slower of {s.token_ops / 1e9:.3g} G operations a token / compute and"
            f" {size(s.chunk_bytes)} a chunk / bandwidth",
        ),
    ]


def rounded(value: float) -> str:
    """Three digits, so that nobody reads more into it."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"
