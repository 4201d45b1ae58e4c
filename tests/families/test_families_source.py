"""Every family's checkpoint matched tensor by tensor: what is missing, too much, left out, or in FP8."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kttools.families import SourceModel, open_model
from kttools_runtime.errors import InvalidInputError
from tests.checkpoint.fp8_forge import make_pair, read_all
from tests.family_oracle import FIRST_CASES, hf_model, save
from tests.forge import save as save_tensors

# A tensor that only this family has, under the hub's name, and its shape in the first case.
OWN_NAMES = {
    "deepseek_v2": ("model.layers.1.mlp.shared_experts.up_proj.weight", [96, 64]),
    "qwen3_moe": ("model.layers.2.self_attn.k_norm.weight", [24]),
    "qwen2_moe": ("model.layers.0.mlp.shared_expert.up_proj.weight", [72, 64]),
    "mixtral": ("model.layers.0.block_sparse_moe.experts.3.w2.weight", [64, 112]),
    "glm4_moe": ("model.layers.1.self_attn.v_proj.bias", [48]),
}
FOREIGN = {
    "deepseek_v2": "model.layers.1.mlp.gate.e_score_correction_bias",
    "qwen3_moe": "model.layers.0.self_attn.q_proj.bias",
    "qwen2_moe": "model.layers.0.self_attn.o_proj.bias",
    "mixtral": "model.layers.0.self_attn.q_norm.weight",
    "glm4_moe": "model.layers.1.mlp.shared_expert_gate.weight",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family's first case under the hub's names. Read-only."""
    root = tmp_path_factory.mktemp("hub")
    return {family: save(hf_model(family, case), root / family) for family, case in FIRST_CASES}


def changed(checkpoint: Path, target: Path, tensors: dict[str, Tensor]) -> Path:
    target.mkdir()
    (target / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    save_tensors(target / "model.safetensors", tensors)
    return target


@pytest.mark.parametrize("family", OWN_NAMES)
def test_missing_tensor_has_the_hubs_name(tmp_path: Path, checkpoints: dict[str, Path], family: str) -> None:
    name, shape = OWN_NAMES[family]
    tensors = read_all(checkpoints[family])
    assert list(tensors.pop(name).shape) == shape
    with pytest.raises(InvalidInputError) as caught:
        open_model(changed(checkpoints[family], tmp_path / "hf", tensors))
    assert f"tensor {name} is missing, expected shape {shape}" in str(caught.value)


@pytest.mark.parametrize("family", OWN_NAMES)
def test_unexpected_tensor(tmp_path: Path, checkpoints: dict[str, Path], family: str) -> None:
    """A tensor that a relative has and this family has not: it would change results."""
    name = FOREIGN[family]
    tensors = read_all(checkpoints[family]) | {name: torch.zeros(96)}
    with pytest.raises(InvalidInputError, match=f"unexpected tensor '{name}'"):
        open_model(changed(checkpoints[family], tmp_path / "hf", tensors))


def test_multi_token_prediction_of_glm_is_left_out(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    extra = {
        "model.layers.3.eh_proj.weight": torch.zeros(64, 128),
        "model.layers.3.mlp.experts.0.up_proj.weight": torch.zeros(48, 64),
        "model.layers.3.shared_head.norm.weight": torch.zeros(64),
    }
    tensors = read_all(checkpoints["glm4_moe"]) | extra
    source = open_model(changed(checkpoints["glm4_moe"], tmp_path / "hf", tensors))
    assert "left out: multi-token-prediction layer 3 (3 tensors)" in source.notices


@pytest.mark.parametrize("family", OWN_NAMES)
def test_fp8(tmp_path: Path, checkpoints: dict[str, Path], family: str) -> None:
    """Block-scaled FP8, as Qwen and DeepSeek release, reads as its own dequantised numbers."""
    fp8, bf16 = (open_model(path) for path in make_pair(checkpoints[family], tmp_path))
    for got, expected in zip(fp8.tensors, bf16.tensors, strict=True):
        assert got.name == expected.name
        assert torch.equal(got.read(), expected.read())
    layer = bf16.moe_layers[-1]
    for got_part, part in zip(fp8.read_expert(layer, 2), bf16.read_expert(layer, 2), strict=True):
        assert torch.equal(got_part, part)


@pytest.mark.parametrize("family", OWN_NAMES)
def test_roles(checkpoints: dict[str, Path], family: str) -> None:
    """What is small or delicate is never quantised: norms, biases, routers and gates."""
    source: SourceModel = open_model(checkpoints[family])
    assert source.family == family
    for tensor in source.tensors:
        is_delicate = tensor.name.endswith(("norm.weight", "bias", "gate.weight", "embed_tokens.weight"))
        assert tensor.role.is_linear is not is_delicate, tensor.name
    by_role = source.parameters_by_role()
    stored = sum(tensor.numel() for tensor in read_all(checkpoints[family]).values())
    assert sum(by_role.values()) == stored
    assert json.loads((checkpoints[family] / "config.json").read_text()) == source.source_config
