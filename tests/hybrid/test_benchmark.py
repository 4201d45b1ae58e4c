"""benchmarks/hybrid.py: the logic on a simulated device, and that it skips by name without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "benchmarks" / "hybrid.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_runs_on_a_simulated_device(nano_bundle_bf16: Path) -> None:
    given = (
        "--device",
        "cpu:0",
        "--steps",
        "4",
        "--context",
        "16",
        "--threads",
        "1",
        "--hot",
        "0,8",
        "--json",
    )
    done = run(str(nano_bundle_bf16), *given)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["is_simulated"]
    assert report["logits_kl"] < 2e-3
    assert report["engine_s"] > 0
    assert report["step_s"] > 0
    assert [row["experts"] for row in report["hot"]] == [0, 8]


def test_skips_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    done = run(str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "")
    assert "torch sees no CUDA device" in done.stderr
