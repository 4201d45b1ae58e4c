"""FP8 checkpoints: every code against torch's float8, ragged blocks, equal packs, and hostile files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kttools.checkpoint import open_checkpoint
from kttools.checkpoint.fp8 import BlockFormat, Fp8Checkpoint, decode_blocks, read_quantization_config
from kttools.cli import main
from kttools.families import open_model
from kttools.quantize.plan import make_plan
from kttools.quantize.recipe import Recipe
from kttools.quantize.writer import Quantizer
from kttools_runtime.errors import CorruptFileError, InvalidInputError, KTError, UnsupportedModelError
from tests.forge import save

from .fp8_forge import BLOCK, QUANTIZATION, decode, encode, make_pair, read_all

BLOCKS = BlockFormat(BLOCK, BLOCK)


def opened(folder: Path, **tensors: Tensor) -> Fp8Checkpoint:
    save(folder / "model.safetensors", tensors)
    checkpoint = open_checkpoint(folder, QUANTIZATION)
    assert isinstance(checkpoint, Fp8Checkpoint)
    return checkpoint


def test_every_code_is_torchs() -> None:
    """All 254 numbers of e4m3, zeros and subnormals of both signs included, at scales large and small."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F][None]
    for scale in (1.0, 2.0**-20, 3.14159e-5, 1e30, 0.0):
        scales = torch.full((1, 2), scale)
        got = decode_blocks(codes, scales, BLOCKS, "x")
        expected = decode(codes.view(torch.float8_e4m3fn), scales)
        assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (160, 96), (1, 1), (129, 257), (300, 130)])
def test_ragged_shapes_rows_and_slices(tmp_path: Path, shape: tuple[int, int]) -> None:
    torch.manual_seed(shape[0])
    codes, scales = encode(torch.randn(shape) * torch.logspace(-3, 3, shape[1]))
    checkpoint = opened(tmp_path, w=codes, w_scale_inv=scales)
    expected = decode(codes, scales)
    assert checkpoint.names() == ["w"]
    assert checkpoint.info("w").dtype == "BF16"
    assert checkpoint.info("w").bytes == 2 * codes.numel()
    assert checkpoint.stored("w").dtype == "F8_E4M3"
    assert checkpoint.stored("w").bytes == codes.numel() + 4 * scales.numel()
    assert torch.equal(checkpoint.read("w"), expected)
    for begin, end in ((0, 1), (shape[0] // 3, shape[0]), (shape[0] // 2, shape[0] // 2), (0, shape[0])):
        assert torch.equal(checkpoint.read_rows("w", begin, end), expected[begin:end])
    assert torch.equal(checkpoint.read_slice("w", shape[0] - 1), expected[-1])


def test_a_scale_reaches_only_its_block(tmp_path: Path) -> None:
    """Scales that all differ: an oracle that would see one shifted by a row or a column."""
    codes = torch.full((300, 300), 1.0).to(torch.float8_e4m3fn)
    scales = torch.arange(1.0, 10.0).view(3, 3)
    got = opened(tmp_path, w=codes, w_scale_inv=scales).read("w").float()
    assert got[127, 127] == 1
    assert got[127, 128] == 2
    assert got[128, 127] == 4
    assert got[256, 299] == 9


def test_stacked_experts(tmp_path: Path) -> None:
    pairs = [encode(torch.randn(140, 200) * (1 + i)) for i in range(3)]
    codes, scales = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
    checkpoint = opened(tmp_path, w=codes, w_scale_inv=scales)
    expected = torch.stack([decode(*pair) for pair in pairs])
    assert torch.equal(checkpoint.read("w"), expected)
    assert torch.equal(checkpoint.read_slice("w", 2), expected[2])
    assert torch.equal(checkpoint.read_rows("w", 1, 3), expected[1:3])


def test_other_tensors_are_as_they_were(tmp_path: Path) -> None:
    codes, scales = encode(torch.randn(4, 4))
    plain = torch.randn(5, 3).to(torch.bfloat16)
    checkpoint = opened(tmp_path, w=codes, w_scale_inv=scales, plain=plain)
    assert len(checkpoint) == 2
    assert "w_scale_inv" not in checkpoint
    assert torch.equal(checkpoint.read("plain"), plain)
    assert torch.equal(checkpoint.read_rows("plain", 1, 2), plain[1:2])
    assert torch.equal(checkpoint.read_slice("plain", 4), plain[4])
    with pytest.raises(InvalidInputError, match="no tensor other"):
        checkpoint.info("other")


def changed(codes: Tensor, at: tuple[int, int], code: int) -> Tensor:
    bits = codes.clone().view(torch.uint8)
    bits[at] = code
    return bits.view(torch.float8_e4m3fn)


CODES, SCALES = encode(torch.randn(200, 300, generator=torch.Generator().manual_seed(1)))
HOSTILE: dict[str, tuple[dict[str, Tensor], str]] = {
    "no scale": ({"w": CODES}, "its scales, tensor 'w_scale_inv', are missing"),
    "scale of other shape": (
        {"w": CODES, "w_scale_inv": SCALES[:1]},
        r"expected .* \[2, 3\] .* got F32 \[1, 3\]",
    ),
    "scale transposed": ({"w": CODES, "w_scale_inv": SCALES.T.contiguous()}, r"got F32 \[3, 2\]"),
    "scale of codes' shape": ({"w": CODES, "w_scale_inv": torch.ones(200, 300)}, r"got F32 \[200, 300\]"),
    "scale a scalar": ({"w": CODES, "w_scale_inv": torch.tensor(1.0)}, r"got F32 \[\]"),
    "scale of integers": ({"w": CODES, "w_scale_inv": SCALES.to(torch.int8)}, "expected F32 or BF16"),
    "scale in FP8": ({"w": CODES, "w_scale_inv": SCALES.to(torch.float8_e4m3fn)}, "are missing|expected F32"),
    "scale without codes": ({"w_scale_inv": SCALES}, "'w_scale_inv' has no F8_E4M3 tensor 'w'"),
    "scale beside bf16": (
        {"w": CODES.to(torch.bfloat16), "w_scale_inv": SCALES},
        "has no F8_E4M3 tensor 'w'",
    ),
    "scale of a scale": (
        {"w": CODES, "w_scale_inv": SCALES, "w_scale_inv_scale_inv": SCALES},
        "has no F8_E4M3 tensor",
    ),
    "a vector": ({"w": CODES[0], "w_scale_inv": SCALES[0]}, "must be a matrix"),
    "empty": ({"w": CODES[:0], "w_scale_inv": SCALES[:0]}, "must be a matrix"),
    "NaN code": (
        {"w": changed(CODES, (130, 299), 0x7F), "w_scale_inv": SCALES},
        r"weight at \[130, 299\] is not",
    ),
    "negative NaN code": (
        {"w": changed(CODES, (0, 0), 0xFF), "w_scale_inv": SCALES},
        r"weight at \[0, 0\] is not",
    ),
    "NaN scale": ({"w": CODES, "w_scale_inv": SCALES * torch.nan}, r"scale at \[0, 0\] is not a finite"),
    "infinite scale": (
        {"w": CODES, "w_scale_inv": torch.where(torch.arange(3) == 2, torch.inf, SCALES)},
        r"scale at \[0, 2\] is not a finite",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CorruptFileError, match=message) as caught:
        opened(tmp_path, **tensors).read("w")
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 3


CONFIGS: list[tuple[Any, type[KTError], str]] = [
    ({"quant_method": "gptq"}, UnsupportedModelError, "quantization_config 'gptq' is not supported"),
    ("fp8", UnsupportedModelError, "quantization_config 'fp8' is not supported"),
    (
        {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [1, 1]},
        UnsupportedModelError,
        "fmt 'e5m2'",
    ),
    ({"quant_method": "fp8"}, UnsupportedModelError, "without weight_block_size"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, InvalidInputError, "must be two integers"),
    ({"quant_method": "fp8", "weight_block_size": [128, 0]}, InvalidInputError, "must be two integers"),
    ({"quant_method": "fp8", "weight_block_size": [128, 2**40]}, InvalidInputError, "must be two integers"),
    ({"quant_method": "fp8", "weight_block_size": [128, True]}, InvalidInputError, "must be two integers"),
]


@pytest.mark.parametrize(("value", "kind", "message"), CONFIGS)
def test_quantization_config(value: Any, kind: type[KTError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        read_quantization_config(value, "config.json")
    assert str(caught.value).startswith("config.json: quantization_config")
    assert read_quantization_config(None, "x") is None


def test_a_model_without_quantization_config_is_refused(tmp_path: Path, nano_checkpoint: Path) -> None:
    fp8, _ = make_pair(nano_checkpoint, tmp_path)
    config = json.loads((fp8 / "config.json").read_text())
    del config["quantization_config"]
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInputError, match="got F8_E4M3"):
        open_model(fp8)


def bundle(source: Path, target: Path) -> dict[str, bytes]:
    Quantizer(make_plan(open_model(source), Recipe("int8", "int4", 128)), target).run()
    return {
        f.relative_to(target).as_posix(): f.read_bytes() for f in sorted(target.rglob("*")) if f.is_file()
    }


def test_same_bundle_as_from_the_dequantised_weights(tmp_path: Path, nano_checkpoint: Path) -> None:
    """ds3-nano in FP8 and its dequantised BF16: packs and shards byte for byte, and other than before."""
    fp8, bf16 = make_pair(nano_checkpoint, tmp_path / "source")
    original = read_all(nano_checkpoint)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert not torch.equal(read_all(bf16)[name], original[name])
    source = open_model(fp8)
    assert source.notices == []
    assert source.expert_dtype == "BF16"
    assert source.source_bytes < 0.75 * open_model(bf16).source_bytes
    got, expected = bundle(fp8, tmp_path / "a"), bundle(bf16, tmp_path / "b")
    assert got.keys() == expected.keys()
    different = [name for name in got if got[name] != expected[name]]
    assert different == ["bundle.json"]  # it names the source files


def broken_model(source: Path, target: Path, kind: str) -> Path:
    """ds3-nano in FP8 with one expert's up_proj damaged."""
    fp8, _ = make_pair(source, target)
    tensors = read_all(fp8)
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    if kind == "no scale":
        del tensors[f"{name}_scale_inv"]
    elif kind == "scale of another block":
        tensors[f"{name}_scale_inv"] = torch.ones(64, 256)
    else:
        tensors[name] = changed(tensors[name], (3, 5), 0x7F)
    save(fp8 / "model.safetensors", tensors)
    return fp8


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no scale", "7.up_proj.weight_scale_inv', are missing"),
        ("scale of another block", "7.up_proj.weight_scale_inv': expected F32 or BF16 [1, 2]"),
        ("NaN", "7.up_proj.weight: the weight at [3, 5] is not a number"),
    ],
)
def test_the_command_line_says_so_in_one_line(
    tmp_path: Path, nano_checkpoint: Path, capsys: pytest.CaptureFixture[str], kind: str, message: str
) -> None:
    fp8 = broken_model(nano_checkpoint, tmp_path / "source", kind)
    assert main(["quantize", str(fp8), "-o", str(tmp_path / "out"), "--quiet"]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out" / "bundle.json").exists()
