"""Results as Markdown, JSON or CSV, with llama-bench's field names first and ours behind them."""

import csv
import io
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kttools_runtime.version import __version__

from .experts import Row

Record = dict[str, Any]
STYLES = ("md", "json", "csv")


def machine() -> Record:
    """llama-bench's build and machine fields, for whoever reads the file later."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "build_commit": _commit(),
        "build_number": __version__,
        "cpu_info": names[0] if names else "unknown",
        "cpus": len(os.sched_getaffinity(0)),
        "test_time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _commit() -> str:
    """Short hash of the checkout this file lies in, "" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def samples(num_tokens: int, seconds: Sequence[float]) -> Record:
    """llama-bench's statistics of one test: nanoseconds and tokens per second."""
    rates = [num_tokens / s for s in seconds]
    nanoseconds = [round(s * 1e9) for s in seconds]
    return {
        "avg_ns": round(statistics.fmean(nanoseconds)),
        "stddev_ns": round(statistics.stdev(nanoseconds)) if len(seconds) > 1 else 0,
        "avg_ts": statistics.fmean(rates),
        "stddev_ts": statistics.stdev(rates) if len(seconds) > 1 else 0.0,
        "samples_ns": nanoseconds,
        "samples_ts": rates,
    }


def expert_record(row: Row) -> Record:
    """One row of bench experts. GB and TOPS are powers of ten; a multiply-add is two operations."""
    shape, seconds = row.shape, row.median_s
    weights = shape.num_experts * shape.weights_per_expert
    return {
        "model_filename": f"random {shape.name} layer",
        "model_type": f"{shape.hidden_size}x{shape.moe_intermediate_size} {row.format}",
        "model_size": shape.num_experts * row.expert_bytes,
        "model_n_params": weights,
        "n_threads": row.threads,
        "n_prompt": row.num_tokens,
        "n_gen": 0,
        "test": f"experts {shape.name} {row.format} top{shape.top_k} t{row.num_tokens}",
        **samples(row.num_tokens, [call.seconds for call in row.calls]),
        "engine": row.engine,
        "format": row.format,
        "isa": row.isa,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "experts_hit": statistics.fmean(call.experts_hit for call in row.calls),
        "median_ms": seconds * 1e3,
        "median_ts": row.num_tokens / seconds,
        "tops": shape.operations(row.num_tokens) / seconds / 1e12,
        "gb_s": row.weight_bytes / seconds / 1e9,
        "floor_ms": statistics.median(row.floors_s) * 1e3,
        "roofline_fraction": row.roofline_fraction,
        "ceiling_gb_s": row.ceilings.bandwidth_bytes_s / 1e9,
        "ceiling_tops": row.ceilings.compute_ops_s / 1e12,
        "ratio": row.ratio,
        "huge_page_share": row.huge_page_share,
        "scratch_mib": None if row.scratch_bytes is None else row.scratch_bytes / 2**20,
    }


EXPERT_COLUMNS = {
    "engine": "engine",
    "n_prompt": "tokens",
    "median_ms": "ms",
    "median_ts": "tok/s",
    "tops": "TOPS",
    "gb_s": "GB/s",
    "floor_ms": "floor ms",
    "roofline_fraction": "of roofline",
    "ceiling_gb_s": "ceiling GB/s",
    "ceiling_tops": "ceiling TOPS",
    "ratio": "peer / ours",
    "scratch_mib": "scratch MiB",
}
MODEL_COLUMNS = {
    "engine": "engine",
    "model_filename": "model",
    "test": "test",
    "n_threads": "threads",
    "avg_ts": "tok/s",
    "stddev_ts": "+-",
    "ratio": "ours / peer",
}


def render(records: Sequence[Record], style: str, columns: dict[str, str], notes: Sequence[str] = ()) -> str:
    """One document. style: md, json or csv; notes: lines below a Markdown table."""
    if style == "json":
        return json.dumps(list(records), indent=1) + "\n"
    if style == "csv":
        return _csv(records)
    head = [f"| {' | '.join(columns.values())} |", "|" + "--|" * len(columns)]
    body = [f"| {' | '.join(_cell(record.get(key)) for key in columns)} |" for record in records]
    return "\n".join([*head, *body, "", *notes]).rstrip() + "\n"


def _csv(records: Sequence[Record]) -> str:
    """Every field; a list of samples becomes a quoted, space-separated cell. A missing value is empty."""
    names = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for record in records:
        values = (record.get(name) for name in names)
        writer.writerow([" ".join(map(str, v)) if isinstance(v, list) else v for v in values])
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
