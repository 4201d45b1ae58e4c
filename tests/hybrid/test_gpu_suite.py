"""benchmarks/gpu_suite.py from end to end on a simulated device, and what it says of stages that fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "benchmarks" / "gpu_suite.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_every_stage_on_a_simulated_device(nano_bundle: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu:0", "--slice", str(nano_bundle), "--slice-experts", "16")
    done = run(
        "-o", str(tmp_path / "r"), *options, "--steps", "4", "--context", "16", "--work", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["stages"]) >= {"tests", "logits", "linears", "slice", "router", "memory", "prefill"}
    assert not [stage for stage in report["stages"].values() if "error" in stage]
    assert report["stages"]["tests"]["passed"] >= 5
    assert report["stages"]["linears"]["layout_is_known"]
    assert report["stages"]["router"]["torch"]["1"] > 0
    aims = {row["aim"]: row["met"] for row in report["aims"]}
    assert list(aims.values())[:3] == [True] * 3
    assert set(list(aims.values())[3:]) == {None}  # times of a simulated device say nothing
    text = (tmp_path / "r.md").read_text()
    assert text == done.stdout
    assert "simulated: its times mean nothing" in text


def test_stages_that_fail_or_find_no_time(tmp_path: Path) -> None:
    """Each is named with its reason, the report is written all the same, and the exit code is 1."""
    done = run("-o", str(tmp_path / "r"), "--device", "cpu:0", "--minutes", "0", "--slice", "none")
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert {stage["error"] for stage in report["stages"].values()} == {"left out: the time is up"}
    assert all(row["met"] is None for row in report["aims"])
    assert "not measured" in (tmp_path / "r.md").read_text()


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    done = run("-o", str(tmp_path / "r"))
    assert (done.returncode, done.stdout) == (0, "")
    assert "torch sees no CUDA device" in done.stderr
