"""gpt-oss in MXFP4: the numbers, both dialects, the errors of its packs, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kttools.checkpoint.gguf.types import BY_NAME, decode
from kttools.checkpoint.mxfp4 import decode_mxfp4
from kttools.families import open_model
from kttools_runtime import _kernels
from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.manifest import load_manifest
from tests.family_oracle import hf_model, quantize, save

FILE = "model.safetensors"
EXPERTS = "model.layers.1.mlp.experts."
# MXFP4 weights of random rows: (largest relative RMS allowed, smallest that would be a surprise).
PACK_ERRORS = {"bf16": (0.0, 0.0), "int8": (0.0, 0.0), "int4": (0.12, 0.03)}


def to_mxfp4(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes of float rows [.., K]; scales as OCP's text says, floor(log2(max)) - 2."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    blocks = rows.float().unflatten(-1, (-1, 32))
    exponents = blocks.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2
    scaled = blocks / exponents.exp2().unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - magnitudes).abs().argmin(-1) + 8 * (scaled < 0)
    pairs = codes.unflatten(-1, (-1, 2)).to(torch.uint8)
    return pairs[..., 0] | pairs[..., 1] << 4, (exponents + 127).to(torch.uint8)


def mxfp4_checkpoint(tmp_path: Path) -> tuple[Path, Path]:
    """One random model twice: as OpenAI ships it, and in BF16 with transformers' own decoding of that."""
    module = pytest.importorskip("transformers.integrations.mxfp4")
    hf = hf_model("gpt_oss", "base", hidden_size=64, intermediate_size=96)
    plain, packed = save(hf, tmp_path / "bf16"), tmp_path / "mxfp4"
    packed.mkdir()
    state = load_file(plain / FILE)
    for name in [
        name for name in state if name.endswith("experts.gate_up_proj") or name.endswith("down_proj")
    ]:
        blocks, scales = to_mxfp4(state[name].mT)
        state[name] = module.convert_moe_packed_tensors(blocks, scales)
    save_file(state, plain / FILE, {"format": "pt"})
    for name in [
        name for name in state if name.endswith("experts.gate_up_proj") or name.endswith("down_proj")
    ]:
        state[f"{name}_blocks"], state[f"{name}_scales"] = to_mxfp4(state.pop(name).mT)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, packed / FILE, {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(config))
    return plain, packed


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return mxfp4_checkpoint(tmp_path_factory.mktemp("gpt_oss"))


def test_every_code_and_scale() -> None:
    """Against the definition: sign, two bits of exponent with bias 1, one of mantissa; 2^(s - 127)."""
    codes = torch.arange(16)
    exponent, mantissa = codes >> 1 & 3, codes & 1
    magnitude = torch.where(exponent == 0, mantissa * 0.5, (1 + mantissa * 0.5) * 2.0 ** (exponent - 1))
    expected = magnitude * torch.where(codes < 8, 1.0, -1.0)
    nibbles = (
        torch.stack((codes[::2] | codes[1::2] << 4, codes[1::2] | codes[::2] << 4)).flatten().to(torch.uint8)
    )
    order = torch.stack((codes, codes.view(-1, 2).flip(-1).flatten())).flatten()
    scales = torch.arange(253, dtype=torch.uint8)[:, None]
    got = decode_mxfp4(nibbles.expand(253, 1, 16), scales, "x").double()
    wanted = expected[order].double() * 2.0 ** (torch.arange(253).double() - 127)[:, None]
    assert torch.equal(got, wanted)


def test_both_dialects_give_one_bundle(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    bundles = []
    for checkpoint in checkpoints:
        source = open_model(checkpoint)
        assert "stacked" in source.expert_layout(1)
        bundles.append(load_manifest(quantize(checkpoint, tmp_path / checkpoint.name, "int8", "int8")))
    plain, packed = (
        {p: f.sha256 for p, f in b.files.items() if p.startswith(("experts/", "shards/"))} for b in bundles
    )
    assert plain == packed
    assert len(plain) == 5
    assert bundles[0].model == bundles[1].model
    assert open_model(checkpoints[1]).source_bytes < open_model(checkpoints[0]).source_bytes


@pytest.mark.parametrize("cpu_format", PACK_ERRORS)
def test_error_of_packs(checkpoints: tuple[Path, Path], tmp_path: Path, cpu_format: str) -> None:
    """What the report says: exact in bf16, and in int8 where the exponents of a row lie close together."""
    bundle = quantize(checkpoints[1], tmp_path / "bundle", cpu_format)
    report = json.loads((bundle / "quantization-report.json").read_text())
    errors = [entry["relative_rms"] for entry in report["tensors"] if entry["role"] == "expert"]
    largest, smallest = PACK_ERRORS[cpu_format]
    assert len(errors) == 3 * 3 * 8
    assert smallest <= min(errors) <= max(errors) <= largest


def test_ggml_holds_the_same_numbers() -> None:
    """llama.cpp's converter moves codes and scales into blocks of its own; a decode of both is equal."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (40, 32), generator=generator, dtype=torch.uint8)
    scales = torch.arange(100, 140, dtype=torch.uint8)[:, None]
    hub = (codes[:, ::2] | codes[:, 1::2] << 4)[:, None]
    ggml = torch.cat((scales, codes[:, :16] | codes[:, 16:] << 4), dim=1)
    decoded = decode(ggml.numpy().reshape(-1), BY_NAME["MXFP4"], 32)
    assert torch.equal(decode_mxfp4(hub, scales, "x").float(), decoded)


@pytest.mark.parametrize("span", [0, 1, 3, 4, 7])
def test_rows_that_int8_holds_exactly(span: int) -> None:
    """Block scales of a row within 2^3 of each other: every number is a multiple of one power of two, at most
    96 of it. Beyond that, and for a number with more bits, a row is scaled by its largest value."""
    generator = torch.Generator().manual_seed(span)
    codes = torch.randint(0, 256, (5, 4, 16), generator=generator, dtype=torch.uint8)
    codes[:, :2] = 0x71  # 6 and 0.5 in the block of the largest and of the smallest scale
    scales = torch.tensor([[100, 100 + span, 100, 100 + span // 2]], dtype=torch.uint8).expand(5, 4)
    rows = decode_mxfp4(codes, scales, "x").float()
    for given in (rows.numpy(), rows.to(torch.bfloat16).view(torch.uint16).numpy()):
        q, row_scale = _kernels.quantize_int8(given)
        is_exact = bool((torch.from_numpy(q * row_scale[:, None]) == rows).all())
        assert is_exact is (span <= 3)
    rows[2, 7] *= 1.25
    _, row_scale = _kernels.quantize_int8(rows.numpy())
    assert row_scale[2] == rows[2].abs().max() / torch.tensor(127.0)


def change(name: str, new: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Any], None]:
    def apply(state: dict[str, torch.Tensor]) -> None:
        value = new(state.pop(EXPERTS + name))
        if value is not None:
            state[EXPERTS + name] = value.contiguous()

    return apply


BROKEN: dict[str, tuple[Callable[[Any], None], str]] = {
    "no scales": (change("gate_up_proj_scales", lambda t: None), "its scales, tensor .* are missing"),
    "no blocks": (change("down_proj_blocks", lambda t: None), "has no blocks"),
    "no bias": (change("down_proj_bias", lambda t: None), "down_proj_bias is missing"),
    "scales of another shape": (change("down_proj_scales", lambda t: t[:, 1:]), "same leading shape"),
    "half a block": (change("down_proj_blocks", lambda t: t[..., :8]), r"blocks and scales"),
    "codes as floats": (change("down_proj_blocks", lambda t: t.to(torch.float32)), "got F32"),
    "scales as int8": (change("down_proj_scales", lambda t: t.to(torch.int8)), "and I8"),
    "an odd number of outputs": (change("gate_up_proj_bias", lambda t: t[:, 1:]), "odd shape"),
    "another width": (change("gate_up_proj_bias", lambda t: t[:, 2:]), "expected shape"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refused(checkpoints: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    apply, message = BROKEN[case]
    state = load_file(checkpoints[1] / FILE)
    apply(state)
    save_file(state, tmp_path / FILE)
    (tmp_path / "config.json").write_bytes((checkpoints[1] / "config.json").read_bytes())
    with pytest.raises(InvalidInputError, match=message):
        open_model(tmp_path)


@pytest.mark.parametrize("scale", [253, 255])
def test_a_scale_that_is_no_number(checkpoints: tuple[Path, Path], tmp_path: Path, scale: int) -> None:
    state = load_file(checkpoints[1] / FILE)
    state[EXPERTS + "down_proj_scales"][3, 5, 1] = scale
    save_file(state, tmp_path / FILE)
    (tmp_path / "config.json").write_bytes((checkpoints[1] / "config.json").read_bytes())
    source = open_model(tmp_path)
    source.read_expert(1, 2)
    with pytest.raises(CorruptFileError, match=rf"down_proj_scales: the scale at .* is {scale}, too large"):
        source.read_expert(1, 3)
