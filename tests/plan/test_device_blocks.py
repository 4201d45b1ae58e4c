"""GGUF's blocks kept in shards are int8 on a GPU: plan says so, and that int4 takes half of it."""

from pathlib import Path

import pytest

from kttools import cli
from kttools.bundle.render import size
from kttools.plan.choice import Choice, open_subject
from kttools_runtime.block_formats import BLOCK_FORMATS
from kttools_runtime.device_footprint import device_bytes, kept_blocks_bytes
from kttools_runtime.footprint import EMBEDDING
from tests.quantize.test_kept_linears import save

MACHINE = ("--bandwidth", "10", "--tops", "1", "-t", "1", "--quiet", "--dram", "8G", "--cpu-format", "bf16")


def test_plan_says_what_kept_blocks_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "m.gguf", monkeypatch)
    subject = open_subject(source)
    kept, small = (subject.layout(Choice("bf16", gpu, 64, "off", 1)).tensors for gpu in ("q4_k", "int4"))
    names = {tensor.name for tensor in kept if tensor.format in BLOCK_FORMATS}
    held = kept_blocks_bytes(kept)
    assert held == sum(t.elements + 4 * t.shape[0] for t in kept if t.name in names - {EMBEDDING})
    smaller = [t for t in small if t.name in names and t.format == "int4"]
    same = sum(t.elements + 4 * t.shape[0] for t in smaller if t.shape[1] >= 128)
    assert sum(device_bytes(t)[1] for t in smaller if t.shape[1] >= 128) < 0.6 * same
    line = f"linears in GGUF's blocks: int8 on a GPU, {size(held)}; shards of --gpu-format int4 take half"
    for gpu, vram, is_said in (("q4_k", "24G", True), ("int4", "24G", False), ("q4_k", None, False)):
        asked = () if vram is None else ("--vram", vram)
        assert cli.main(["plan", str(source), "--gpu-format", gpu, *asked, *MACHINE]) == 0
        assert (line in capsys.readouterr().out) == is_said
