"""diff: known differences in known tensors, every pair of kinds, what cannot be compared, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kttools.cli import main
from kttools.eval.diff import compare
from kttools.families import open_model
from kttools.gguf_out.plan import make_plan
from kttools.gguf_out.writer import write
from kttools.model_source import open_source
from kttools_runtime.errors import InvalidInputError
from tests.forge import config, hub_tensors, save_model

CONFIG = config()


def model(folder: Path, **changes: torch.Tensor) -> Path:
    return save_model(folder, CONFIG, hub_tensors(CONFIG) | changes)


def test_a_model_equals_itself_in_every_form(
    tmp_path: Path, nano_checkpoint: Path, nano_bundle_bf16: Path
) -> None:
    write(make_plan(open_model(nano_checkpoint), tmp_path / "n.gguf", "bf16"))
    for other in (nano_checkpoint, tmp_path / "n.gguf", nano_bundle_bf16):
        result = compare(open_source(str(nano_checkpoint)), open_source(str(other)))
        assert result.missing == []
        assert len(result.errors) == 57 + 3 * 32 * 3
        assert result.worst_relative_rms == 0.0
        assert all(error.cosine == 1.0 for error in result.errors)


def test_one_changed_element_is_found(tmp_path: Path) -> None:
    a = model(tmp_path / "a")
    name = "model.layers.2.mlp.experts.4.down_proj.weight"
    original = hub_tensors(CONFIG)[name]
    changed = original.clone()
    changed[3, 5] = 10.0
    result = compare(open_model(a), open_model(model(tmp_path / "b", **{name: changed})))
    (found,) = [error for error in result.errors if error.relative_rms > 0]
    assert found.name == name
    assert found.role == "expert"
    delta = 10.0 - float(original[3, 5])
    expected = abs(delta) / float(original.double().norm())
    assert abs(found.relative_rms - expected) <= 1e-5 * expected
    assert abs(found.max_abs_error - abs(delta)) <= 1e-4
    dot = float((original.double() * changed.double()).sum())
    cosine = dot / float(original.double().norm() * changed.double().norm())
    assert abs(found.cosine - cosine) <= 1e-5


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    fewer = config(num_hidden_layers=2, vocab_size=60)
    save_model(tmp_path / "b", fewer, hub_tensors(fewer))
    result = compare(open_model(model(tmp_path / "a")), open_model(tmp_path / "b"))
    assert "model.embed_tokens.weight: shape [50, 24] and [60, 24]" in result.missing
    assert "model.layers.2.mlp.gate.weight: only in the first" in result.missing
    assert "model.layers.2.mlp.experts.*: only in the first" in result.missing
    other = config(n_routed_experts=3, n_group=1, topk_group=1)
    save_model(tmp_path / "c", other, hub_tensors(other))
    result = compare(open_model(tmp_path / "a"), open_model(tmp_path / "c"))
    assert any("experts.*: shape [6, 12, 24] and [3, 12, 24]" in line for line in result.missing)


def test_a_value_that_is_no_number(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    broken = torch.full((12, 24), np.nan).to(torch.bfloat16)
    b = open_model(model(tmp_path / "b", **{name: broken}))
    with pytest.raises(InvalidInputError, match=f"tensor {name}: a value is not a finite number"):
        compare(open_model(model(tmp_path / "a")), b)


def test_command(nano_checkpoint: Path, nano_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(nano_checkpoint), str(nano_bundle), "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "worst by relative rms" in text
    assert "345 tensors compared" in text
    line = ["diff", str(nano_checkpoint), str(nano_bundle), "--quiet", "--json", "--max-relative-rms"]
    assert main([*line, "0.5"]) == 0
    document = json.loads(capsys.readouterr().out)
    report = json.loads((nano_bundle / "quantization-report.json").read_text())
    measured = {error["name"]: error["relative_rms"] for error in report["tensors"]}
    for error in document["tensors"]:
        if error["name"] in measured:  # what quantize says it lost, from another path to the same numbers
            assert (
                abs(error["relative_rms"] - measured[error["name"]]) <= 2e-3 * measured[error["name"]] + 1e-6
            )
    assert main([*line, "0.0001"]) == 6
    assert "is above 0.0001" in capsys.readouterr().err
    for bound in ("nan", "inf"):
        assert main([*line, bound]) == 2
        assert "must be a finite number" in capsys.readouterr().err
