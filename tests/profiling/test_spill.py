"""Hidden states in a file: the same bits, no file left, RAM bounded, and the judge's numbers as before."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kttools.profiling import measure, spill
from kttools.profiling.layerwise import LayerRunner, Window
from kttools.profiling.measure import Judge
from kttools.profiling.plain_policies import PlainPolicy
from kttools_runtime import load
from kttools_runtime.errors import ResourceError


def tensors(lengths: list[int], width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(length, width, generator=generator) for length in lengths]
    made[0].view(-1)[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    return made


@pytest.mark.parametrize("is_spilt", [True, False])
def test_bit_for_bit_and_in_order(is_spilt: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "HELD_BYTES", 0 if is_spilt else 1 << 30)
    made = tensors([5, 1, 700, 2], 37)
    held = spill.hold(iter(made), 708, 37, tmp_path / "new")
    assert len(held) == 4
    for one, other in zip(held, made, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
    assert [len(t) for t in held[::2]] == [5, 700]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_disk_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "HELD_BYTES", 0)
    made = (pytest.fail("computed before the disk was looked at") for _ in range(1))
    with pytest.raises(ResourceError, match="GiB free; give fewer --eval-tokens"):
        spill.hold(made, 1 << 40, 1024, tmp_path)


def test_what_stays_of_a_window_is_made_before_what_passes(
    runner: LayerRunner, texts: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KL of all tokens lies in one block from before the first logits.

    Small blocks in between hold the heap open: a run that judged 60,000 tokens grew past 3 GB by them.
    """
    judge, before = Judge(runner, texts[:4]), []
    _ = judge.full
    make = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **more: before.append(made := make(*size, **more)) or made
    )
    compare = measure.compare_tokens

    def compared(*given: Any) -> measure.TokenSums:
        monkeypatch.setattr(torch, "empty", make)
        return compare(*given)

    monkeypatch.setattr(measure, "compare_tokens", compared)
    found = judge.measure(PlainPolicy("flat:6", "flat", (6.0,)).policies(runner.config))
    kept = [row for rows in found.token_kl.values() for row in rows]
    assert sum(map(len, kept)) == sum(len(window.token_ids) - 1 for window in texts[:4])
    assert {row.untyped_storage().data_ptr() for row in kept} == {before[0].untyped_storage().data_ptr()}


def test_ram_is_bounded(tmp_path: Path, repo: Path) -> None:
    """400 MB of hidden states in a process that grows by a tenth of them."""
    code = """
import sys, torch
from pathlib import Path
from kttools.profiling import spill
from tests.memory import anonymous_bytes
spill.HELD_BYTES = 0
assert float(torch.full((100, 1000), 1.0).sum()) == 1e5  # torch's own: threads, their stacks
before = anonymous_bytes()
held = spill.hold((torch.full((100, 1000), float(i)) for i in range(1000)), 100_000, 1000, Path(sys.argv[1]))
assert sum(float(t[0, 0]) for t in held) == sum(range(1000))
assert sum(float(t.sum()) for t in held[::500]) == 50e6
print(anonymous_bytes() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=repo, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40_000_000, done.stdout
    assert os.listdir(tmp_path) == []


def test_the_judge_measures_the_same(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = LayerRunner(load(nano_bundle, threads=1, expert_table="none"))
    generator = torch.Generator().manual_seed(5)
    windows = [
        Window("d", str(i), torch.randint(0, runner.config.vocab_size, (40 + i,), generator=generator))
        for i in range(4)
    ]
    policies = PlainPolicy("flat:5", "flat", (5,)).policies(runner.config)
    found = []
    for held in (1 << 30, 0):
        monkeypatch.setattr(spill, "HELD_BYTES", held)
        judge = Judge(runner, windows)
        judge.part(2).measure(policies)
        result = judge.measure(policies)
        part = judge.part(2)
        found.append((result.documents, result.token_kl, part.measure(policies).documents))
        assert isinstance(judge.full, list) is (held > 0)
    assert found[0][0] == found[1][0]
    assert found[0][2] == found[1][2]
    for one, other in zip(found[0][1]["d"], found[1][1]["d"], strict=True):
        assert torch.equal(one, other)
    assert measure.hold is spill.hold
