"""Everything about a GPU in one command and ten minutes: tests, logits, graphs, overlap, hot experts, memory.

    python benchmarks/gpu_suite.py -o RESULT [--device cuda:0] [--slice BUNDLE] [--work DIR] [--minutes 9.5]

Writes RESULT.json and RESULT.md with the device's name. Without --slice a slice of DeepSeek-V3's dimensions
is made in --work and quantised first; --slice none leaves it out. Each stage is a process of its own: one
that fails or takes too long is reported as that, and the others run. --device cpu:0 runs the same on a
simulated device, whose times mean nothing.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_stages

REPO = Path(__file__).resolve().parents[1]
SAMPLE = REPO / "samples" / "ds3-nano"
# (aim, where the figure is: stage and path of keys, at most / at least, bound)
AIMS = (
    ("float32 logits of the sample model, over the largest", ("logits", "float32_error"), "<=", 1e-3),
    ("median KL of int4 and int8 weights in bf16, nats", ("logits", "int8_int4_kl"), "<=", 4e-4),
    ("median KL of the slice, nats", ("slice", "logits_kl"), "<=", 4e-4),
    ("decode with the graph over without", ("slice", "graph_gain"), ">=", 1.5),
    ("a layer's time over its bytes at the bandwidth", ("slice", "device_layer_over_bandwidth"), "<=", 2.0),
    ("step over the larger of both sides", ("slice", "overlap"), "<=", 1.1),
    ("hot experts: tok/s off the prediction", ("slice", "hot_off"), "<=", 0.2),
    ("memory: off the plan's figure", ("memory", "off"), "<=", 0.05),
)


@dataclass(slots=True)
class Suite:
    """device: as --device; until: time.monotonic() at which no stage begins any more."""

    device: str
    work: Path
    until: float
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_simulated(self) -> bool:
        return self.device.startswith("cpu")

    def run(self, name: str, command: list[str], read: Callable[[str], dict[str, Any]] = json.loads) -> None:
        """A process whose stdout `read` understands; what went wrong instead, under "error"."""
        left, start = self.until - time.monotonic(), time.monotonic()
        if left <= 0:
            self.stages[name] = {"error": "left out: the time is up"}
            return
        sys.stderr.write(f"{name} ...\n")
        paths = [str(REPO), str(REPO / "runtime"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        try:
            done = subprocess.run(
                [sys.executable, *command],
                capture_output=True,
                text=True,
                timeout=left,
                env=environment,
                cwd=REPO,
            )
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            found = read(done.stdout) if done.returncode == 0 else {"error": last}
        except subprocess.TimeoutExpired:
            found = {"error": f"stopped after {left:.0f} s"}
        except ValueError as error:
            found = {"error": f"no result: {error}"}
        self.stages[name] = {**found, "stage_s": round(time.monotonic() - start, 1)}


def main() -> int:
    given = arguments()
    if given.stage is not None:
        sys.stdout.write(json.dumps(gpu_stages.STAGES[given.stage](given.device, given.bundles)) + "\n")
        return 0
    gpu_stages.check_device(given.device)
    with tempfile.TemporaryDirectory() as scratch:
        suite = Suite(given.device, given.work or Path(scratch), time.monotonic() + 60 * given.minutes)
        stages(suite, given)
    report = {**machine(given.device), "stages": suite.stages, "aims": aims(suite)}
    given.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="ascii")
    given.output.with_suffix(".md").write_text(as_markdown(report), encoding="ascii")
    sys.stdout.write(as_markdown(report))
    return 1 if any("error" in stage for stage in suite.stages.values()) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu-suite"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--slice", help="a bundle of true dimensions, or none")
    parser.add_argument(
        "--slice-experts", type=int, default=16, help="of a slice that is made: 4.6 GB with 16"
    )
    parser.add_argument("--work", type=Path, help="where bundles are made and stay")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--stage", choices=sorted(gpu_stages.STAGES), help=argparse.SUPPRESS)
    parser.add_argument("bundles", nargs="*", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def stages(suite: Suite, given: argparse.Namespace) -> None:
    plain = bundle(suite, "nano-bf16", SAMPLE, "bf16", "bf16")
    small = bundle(suite, "nano-int8", SAMPLE, "int8", "int4")
    own = [__file__, "--device", suite.device, "--stage"]
    which = ["-m", "gpu", "tests/hybrid"]
    if suite.is_simulated:
        which = ["tests/hybrid/test_handshake.py", "-k", "faults_surface"]
    suite.run("tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", *which], counts)
    suite.run("logits", [*own, "logits", str(plain), str(small)])
    suite.run("linears", [*own, "linears"])
    large = slice_of(suite, given)
    if large is None:
        return
    hot = f"0,{max(1, given.slice_experts // 4)},{max(2, given.slice_experts // 2)}"
    options = ["--device", suite.device, "--steps", str(given.steps), "--context", str(given.context)]
    command = [str(REPO / "benchmarks" / "hybrid.py"), str(large), *options, "--hot", hot, "--json"]
    suite.run("slice", command, with_hot_off)
    suite.run("router", [*own, "router", str(large)])
    suite.run("memory", [*own, "memory", str(large)])
    suite.run("prefill", [*own, "prefill", str(large)])


def bundle(suite: Suite, name: str, source: Path, cpu: str, gpu: str) -> Path:
    path = suite.work / name
    if not path.is_dir():
        formats = ["--cpu-format", cpu, "--gpu-format", gpu, "--quiet"]
        suite.run(name, ["-m", "kttools", "quantize", str(source), "-o", str(path), *formats], lambda _: {})
    return path


def slice_of(suite: Suite, given: argparse.Namespace) -> Path | None:
    """The bundle of --slice, or one that is made; None: left out."""
    if given.slice is not None:
        return None if given.slice == "none" else Path(given.slice)
    source = suite.work / "slice"
    if not source.is_dir():
        script = str(REPO / "benchmarks" / "make_slice.py")
        suite.run(
            "make_slice", [script, "-o", str(source), "--experts", str(given.slice_experts)], lambda _: {}
        )
    return bundle(suite, "slice-int8", source, "int8", "int4")


def counts(text: str) -> dict[str, Any]:
    """Of pytest's last line. Raises ValueError where there is none."""
    found = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped)", text)}
    if "passed" not in found:
        raise ValueError("no test passed")
    return found


def with_hot_off(text: str) -> dict[str, Any]:
    """benchmarks/hybrid.py's report, and the worst deviation of hot experts from their prediction."""
    report: dict[str, Any] = json.loads(text)
    report["hot_off"] = max(abs(row["tok_s"] / row["predicted_tok_s"] - 1) for row in report["hot"])
    return report


def machine(device: str) -> dict[str, Any]:
    return {
        "device": gpu_stages.device_name(device),
        "is_simulated": device.startswith("cpu"),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        **gpu_stages.versions(),
    }


def cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return found[1] if found else platform.processor()


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=REPO)
    return done.stdout.strip() or "unknown"


def aims(suite: Suite) -> list[dict[str, Any]]:
    """Each aim with its figure; met: None where it was not measured, or on a simulated device's time."""
    rows = []
    for aim, (stage, key), sign, bound in AIMS:
        value = suite.stages.get(stage, {}).get(key)
        is_time = stage in ("slice", "memory") and key != "logits_kl"
        met = None
        if value is not None and not (is_time and suite.is_simulated):
            met = value <= bound if sign == "<=" else value >= bound
        rows.append({"aim": aim, "value": value, "bound": f"{sign} {bound:g}", "met": met})
    return rows


def as_markdown(report: dict[str, Any]) -> str:
    kind = ", simulated: its times mean nothing" if report["is_simulated"] else ""
    lines = [f"# {report['device']}{kind}", ""]
    lines += [
        f"{key}: {report[key]}  " for key in ("cpu", "cpus", "when", "commit", "torch", "cuda", "triton")
    ]
    lines += ["", "| aim | measured | bound | met |", "|--|--|--|--|"]
    for row in report["aims"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.4g}"
        met = {None: "-", True: "yes", False: "NO"}[row["met"]]
        lines.append(f"| {row['aim']} | {value} | {row['bound']} | {met} |")
    for name, stage in report["stages"].items():
        lines += ["", f"## {name}", "```json", json.dumps(stage, indent=1), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
