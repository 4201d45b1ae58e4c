"""Inspect: the right kind for every path, numbers that add up, one document with --json."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kttools.bundle.inspect import inspect_path
from kttools.bundle.render import amount, render, size
from kttools.commands.inspect import command
from kttools_runtime.errors import CorruptFileError, InvalidInputError
from tests.forge import CONFIG, config, hub_tensors, save, save_model


def test_bundle(sound_bundle: Path) -> None:
    report = inspect_path(sound_bundle)
    assert report["kind"] == "bundle"
    assert inspect_path(sound_bundle / "bundle.json") == report
    parameters = sum(tensor.numel() for tensor in hub_tensors(CONFIG).values())
    assert report["parameters"]["total"] == parameters
    assert sum(report["parameters"]["by_role"].values()) == parameters
    expert = 3 * 24 * 12
    embedding = 50 * 24
    assert report["parameters"]["active"] == parameters - embedding - 2 * (6 - 2) * expert
    sizes = {entry["path"]: entry["bytes"] for entry in report["files"]}
    assert report["bytes"]["total"] == sum(sizes.values())
    packs = sum(size for name, size in sizes.items() if name.startswith("experts/"))
    assert report["bytes"]["experts"] == report["bytes"]["by_format"]["experts int8"] == packs
    assert report["linears"] == {"bf16": 10, "int8": 15}
    assert report["source"]["files"][0]["path"] == "config.json"
    text = render(report)
    assert "6 routed, 2 per token, 2 shared, 2 of 3 groups" in text
    assert "2 layers, int8" in text


def test_checkpoint(tmp_path: Path) -> None:
    tensors = hub_tensors(CONFIG)
    report = inspect_path(save_model(tmp_path, CONFIG, tensors))
    assert (report["kind"], report["family"]) == ("checkpoint", "deepseek_v3")
    assert report["tensors"] == len(tensors)
    assert report["parameters"]["total"] == sum(tensor.numel() for tensor in tensors.values())
    assert report["experts"] == {"layers": 2, "dtype": "BF16", "stored": {"one tensor per expert": 2}}
    assert set(report["bytes"]["by_format"]) == {"BF16", "F32"}
    assert inspect_path(tmp_path / "config.json") == report
    assert "no tokenizer.json" in render(report)


def test_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    values = config(architectures=["LlamaForCausalLM"])
    report = inspect_path(save_model(tmp_path, values, {"a": torch.zeros(3)}))
    assert report["family"] is None
    assert report["bytes"]["total"] == 12
    assert "architecture LlamaForCausalLM is not supported" in render(report)


def test_safetensors(tmp_path: Path) -> None:
    many = {f"t{i:02d}": torch.zeros(2, 3) for i in range(50)}
    save(tmp_path / "x.safetensors", many, {"format": "pt"})
    report = inspect_path(tmp_path / "x.safetensors")
    assert report["kind"] == "safetensors"
    assert len(report["tensors"]) == 50
    assert report["tensors"][0] == {"name": "t00", "dtype": "F32", "shape": [2, 3], "bytes": 24}
    assert "and 30 more" in render(report)


def test_control_characters_are_not_printed(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", {"a\x1b[2Jb": torch.zeros(1)}, {"note": "\x1b]0;title\x07"})
    text = render(inspect_path(tmp_path / "x.safetensors"))
    assert text.replace("\n", "").isprintable()
    assert "a\\x1b[2Jb" in text


def test_pack(sound_bundle: Path) -> None:
    file = sound_bundle / "experts/layer-00002.ktpack"
    report = inspect_path(file)
    assert (report["kind"], report["layer"], report["num_experts"]) == ("pack", 2, 6)
    assert report["formats"] == {"int8": 6}
    assert report["bytes"]["total"] == file.stat().st_size
    assert "6 (6 int8)" in render(report)


def test_errors(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(InvalidInputError, match="no such file or directory"):
        inspect_path(tmp_path / "nowhere")
    (tmp_path / "x.txt").touch()
    with pytest.raises(InvalidInputError, match="expected a bundle, a checkpoint directory"):
        inspect_path(tmp_path / "x.txt")
    for name in ("x.safetensors", "x.ktpack"):
        (tmp_path / name).write_bytes(b"garbage!" * 100)
        with pytest.raises(CorruptFileError):
            inspect_path(tmp_path / name)
    (bundle / "bundle.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="not a kttools-bundle manifest"):
        inspect_path(bundle)


def test_command(sound_bundle: Path) -> None:
    done = CliRunner().invoke(command, [str(sound_bundle), "--json"])
    assert json.loads(done.stdout) == json.loads(json.dumps(inspect_path(sound_bundle)))
    text = CliRunner().invoke(command, [str(sound_bundle)]).stdout
    assert text.startswith("kind")
    assert "source" in text


def test_units() -> None:
    assert [size(n) for n in (0, 1023, 1536, 3 << 30)] == ["0 B", "1023 B", "1.50 KiB", "3.00 GiB"]
    assert [amount(n) for n in (7, 1500, 2_500_000, 671_026_419_200)] == ["7", "1.50 K", "2.50 M", "671.03 B"]


def test_real_models(nano_checkpoint: Path, nano_bundle: Path) -> None:
    checkpoint, bundle = inspect_path(nano_checkpoint), inspect_path(nano_bundle)
    assert checkpoint["parameters"] == bundle["parameters"]
    assert checkpoint["model"] == bundle["model"]
    render(checkpoint)
    render(bundle)


def test_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kttools.cli import main
    from tests.checkpoint.gguf_forge import U32, Image, deepseek2

    file = deepseek2().save(tmp_path / "x.gguf")
    report = inspect_path(file)
    assert report["kind"] == "gguf"
    assert report["family"] == "deepseek_v3"
    assert report["metadata"]["deepseek2.expert_count"] == 4
    assert report["tokenizer"] == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert report["bytes"]["by_format"].keys() == {"F32"}
    assert inspect_path(tmp_path)["tensors"] == report["tensors"]
    assert main(["inspect", str(file)]) == 0
    assert "deepseek2.expert_count = 4" in capsys.readouterr().out
    image = deepseek2()
    image.pairs[0] = ("general.architecture", 8, "other")
    unknown = inspect_path(image.save(tmp_path / "x.gguf"))
    assert unknown["family"] is None
    assert "'other' is not supported" in unknown["notices"][0]
    assert Image([("a", U32, 1)]).save(tmp_path / "x.gguf")
    with pytest.raises(InvalidInputError, match="holds no tensors"):
        inspect_path(file)
