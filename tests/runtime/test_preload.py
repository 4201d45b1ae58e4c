"""Packs read ahead: every expert once and in order, none that is unneeded, and an end at any time."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import torch

import kttools_runtime as kt
from kttools_runtime.pack import read_pack_header
from kttools_runtime.preload import PackReader
from tests.memory import mapped


class Layer:
    """Writes down what is asked of it, and waits at one expert if told so."""

    def __init__(self, index: int, seen: list[tuple[int, int]], gate: threading.Event | None = None) -> None:
        self.index, self.seen, self.gate = index, seen, gate
        self.num_experts = 4

    def make_resident(self, expert: int) -> None:
        self.seen.append((self.index, expert))
        if self.gate is not None and expert == 1:
            self.gate.wait(10)

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor:
        raise AssertionError("nobody computes here")


def test_reads_all_but_the_unneeded_in_order() -> None:
    seen: list[tuple[int, int]] = []
    reader = PackReader({3: Layer(3, seen), 1: Layer(1, seen)}, {1: (0, 2)})
    reader.start()
    reader.wait()
    assert seen == [(3, 0), (3, 1), (3, 2), (3, 3), (1, 1), (1, 3)]


def test_stops_after_the_expert_it_is_at() -> None:
    seen: list[tuple[int, int]] = []
    gate = threading.Event()
    reader = PackReader({0: Layer(0, seen, gate), 1: Layer(1, seen)})
    reader.start()
    threading.Timer(0.2, gate.set).start()
    reader.stop()
    assert seen[-1] == (0, 1)
    reader.stop()  # again: nothing


def test_a_models_packs_are_mapped_whole(nano_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "own"  # other tests of this process may still map the fixture's
    shutil.copytree(nano_bundle, bundle)
    packs = sorted((bundle / "experts").glob("*.ktpack"))
    blobs = sum(expert.bytes for path in packs for expert in read_pack_header(path).experts)
    model = kt.load(bundle)
    assert resident(packs) < blobs
    reader = model.pack_reader()
    reader.start()
    reader.wait()
    assert resident(packs) >= blobs


def resident(packs: list[Path]) -> int:
    """Bytes of these files that are mapped and in memory."""
    return sum(mapped("self", str(path))["Rss"] for path in packs)


def test_a_process_may_end_while_it_reads(nano_bundle: Path) -> None:
    code = f"""
import kttools_runtime as kt
for _ in range(20):
    kt.load({str(nano_bundle)!r}).pack_reader().start()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
