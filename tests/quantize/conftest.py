"""Small random checkpoints, and runs of quantize in this process and as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kttools.families import open_model
from kttools.quantize.plan import Plan, make_plan
from kttools.quantize.recipe import Recipe
from kttools.quantize.writer import Outcome, Quantizer
from tests.forge import config, hub_tensors, save_model

# Sides on both sides of the smallest that is quantised; inputs that no group size divides.
SIZES: dict[str, Any] = {
    "hidden_size": 72,
    "intermediate_size": 136,
    "moe_intermediate_size": 48,
    "q_lora_rank": 40,
    "kv_lora_rank": 33,
    "vocab_size": 300,
    "num_hidden_layers": 4,
}


def plan_for(path: Path, cpu: str = "int8", gpu: str = "int4", group: int = 32, workers: int = 1) -> Plan:
    return make_plan(open_model(path), Recipe(cpu, gpu, group), workers)


def quantize(path: Path, target: Path, force: bool = False, **options: Any) -> Outcome:
    return Quantizer(plan_for(path, **options), target, force).run()


def contents(bundle: Path) -> dict[str, bytes]:
    """Every file by relative path."""
    files = (path for path in sorted(bundle.rglob("*")) if path.is_file())
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in files}


def command(source: Path, target: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "kttools", "quantize", str(source), "-o", str(target), *options]


def run(source: Path, target: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """The command line, its output captured."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KTTOOLS_")}
    line = command(source, target, *options)
    return subprocess.run(line, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BF16 checkpoint with a tokenizer file, read-only."""
    values = config(**SIZES)
    path = save_model(tmp_path_factory.mktemp("source") / "model", values, hub_tensors(values))
    (path / "tokenizer.json").write_text('{"made": "up"}')
    (path / "tokenizer_config.json").write_text("{}")
    return path
