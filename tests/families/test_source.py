"""A checkpoint against its family: both ways to store experts, and one line for each way to be wrong."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kttools.families import Role, SourceModel, canonical_tensors, open_model
from kttools_runtime.errors import CorruptFileError, InvalidInputError, UnsupportedModelError
from tests.forge import CONFIG, config, hub_tensors, save, save_model, save_sharded, stack_experts

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return hub_tensors(CONFIG)


def check_all(source: SourceModel, values: dict[str, Any], tensors: Tensors) -> None:
    """Every tensor that is read equals the one written under the hub's name, and none is forgotten."""
    seen = set()
    for tensor in source.tensors:
        assert torch.equal(tensor.read(), tensors[tensor.name])
        seen.add(tensor.name)
    for layer in source.moe_layers:
        for expert in range(values["n_routed_experts"]):
            names = [
                f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                for name in ("gate_proj", "up_proj", "down_proj")
            ]
            for name, part in zip(names, source.read_expert(layer, expert), strict=True):
                assert part.is_contiguous()
                assert torch.equal(part, tensors[name])
            seen.update(names)
    assert seen == set(tensors)


def test_one_tensor_per_expert(tmp_path: Path, tensors: Tensors) -> None:
    source = open_model(save_model(tmp_path, CONFIG, tensors))
    check_all(source, CONFIG, tensors)
    assert source.family == "deepseek_v3"
    assert source.expert_dtype == "BF16"
    assert source.source_config == CONFIG
    assert source.source_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert source.expert_layout(1) == "one tensor per expert"
    assert {file.name for file in source.files} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_stacked_experts_are_the_same(tmp_path: Path, tensors: Tensors, fuse: bool, suffix: str) -> None:
    stacked = stack_experts(tensors, CONFIG, fuse, suffix)
    source = open_model(save_model(tmp_path, CONFIG, stacked))
    check_all(source, CONFIG, tensors)
    assert "experts stacked" in source.expert_layout(2)


def test_layers_may_differ_in_layout(tmp_path: Path, tensors: Tensors) -> None:
    stacked = stack_experts(tensors, CONFIG, fuse=True)
    mixed = {name: t for name, t in tensors.items() if ".layers.2.mlp.experts." not in name}
    mixed |= {name: t for name, t in stacked.items() if ".layers.2.mlp.experts." in name}
    check_all(open_model(save_model(tmp_path, CONFIG, mixed)), CONFIG, tensors)


def test_shards_with_six_digits(tmp_path: Path, tensors: Tensors) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_sharded(tmp_path, tensors, 4, digits=6)
    source = open_model(tmp_path)
    check_all(source, CONFIG, tensors)
    assert len(source.files) == 6


VARIANTS: list[dict[str, Any]] = [
    {"q_lora_rank": None},
    {"n_shared_experts": 0},
    {"first_k_dense_replace": 0},
    {"first_k_dense_replace": 3},
    {"tie_word_embeddings": True},
    {"n_group": 1, "topk_group": 1, "n_routed_experts": 5, "num_experts_per_tok": 5},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_variants(tmp_path: Path, changes: dict[str, Any]) -> None:
    values = config(**changes)
    tensors = hub_tensors(values)
    source = open_model(save_model(tmp_path, values, tensors))
    check_all(source, values, tensors)
    by_role = source.parameters_by_role()
    assert sum(by_role.values()) == sum(t.numel() for t in tensors.values())
    assert (Role.HEAD in by_role) is not source.config.tie_word_embeddings


def test_roles(tmp_path: Path, tensors: Tensors) -> None:
    source = open_model(save_model(tmp_path, CONFIG, tensors))
    roles = {tensor.name: tensor.role for tensor in source.tensors}
    assert roles["model.embed_tokens.weight"] is Role.EMBEDDING
    assert roles["lm_head.weight"] is Role.HEAD
    assert roles["model.layers.1.mlp.gate.weight"] is Role.ROUTER
    assert roles["model.layers.1.mlp.gate.e_score_correction_bias"] is Role.ROUTER_BIAS
    assert roles["model.layers.0.mlp.up_proj.weight"] is Role.DENSE_MLP
    assert roles["model.layers.2.mlp.shared_experts.down_proj.weight"] is Role.SHARED_EXPERT
    assert roles["model.layers.2.self_attn.kv_b_proj.weight"] is Role.ATTENTION
    assert roles["model.layers.2.self_attn.q_a_layernorm.weight"] is Role.NORM
    linear = {role for role in Role if role.is_linear}
    assert linear == {Role.ATTENTION, Role.DENSE_MLP, Role.SHARED_EXPERT, Role.HEAD}
    names = [tensor.name for tensor in source.tensors]
    assert names == [spec.name for spec in canonical_tensors(source.config)]


def test_dtypes(tmp_path: Path, tensors: Tensors) -> None:
    half = {name: t.half() for name, t in tensors.items()}
    assert open_model(save_model(tmp_path / "half", CONFIG, half)).expert_dtype == "F16"
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    mixed = tensors | {name: tensors[name].float()}
    source = open_model(save_model(tmp_path / "mixed", CONFIG, mixed))
    assert source.expert_dtype == "F32"
    assert source.read_expert(1, 0)[1].dtype is torch.float32
    assert source.read_expert(1, 1)[1].dtype is torch.bfloat16


def test_mtp_layers_are_left_out(tmp_path: Path, tensors: Tensors) -> None:
    values = config(num_nextn_predict_layers=1)
    extra = {
        "model.layers.3.eh_proj.weight": torch.zeros(24, 48),
        "model.layers.3.enorm.weight": torch.zeros(24),
        "model.layers.3.mlp.experts.0.up_proj.weight": torch.zeros(12, 24),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    source = open_model(save_model(tmp_path, values, tensors | extra))
    check_all(source, values, tensors)
    assert "left out: multi-token-prediction layer 3 (3 tensors)" in source.notices
    assert any("rope frequencies" in notice for notice in source.notices)


def test_a_layer_beyond_the_last_without_eh_proj_is_an_error(tmp_path: Path, tensors: Tensors) -> None:
    values = config(num_hidden_layers=2)
    with pytest.raises(InvalidInputError, match=r"unexpected tensor 'model\.layers\.2\."):
        open_model(save_model(tmp_path, values, tensors))


def test_tied_head_is_left_out(tmp_path: Path, tensors: Tensors) -> None:
    source = open_model(save_model(tmp_path, config(tie_word_embeddings=True), tensors))
    assert "lm_head.weight" not in [tensor.name for tensor in source.tensors]
    assert any("tied to the embedding" in notice for notice in source.notices)


def test_empty_shared_experts_of_transformers_are_left_out(tmp_path: Path) -> None:
    values = config(n_shared_experts=0)
    tensors = hub_tensors(values)
    empty = {
        f"model.layers.{layer}.mlp.shared_experts.{name}.weight": torch.zeros(shape)
        for layer in (1, 2)
        for name, shape in (("gate_proj", (0, 24)), ("up_proj", (0, 24)), ("down_proj", (24, 0)))
    }
    check_all(open_model(save_model(tmp_path, values, tensors | empty)), values, tensors)


Change = Callable[[Tensors], object]
O_PROJ, UP = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
BROKEN: dict[str, tuple[Change, str]] = {
    "missing linear": (lambda t: t.pop(O_PROJ), f"tensor {O_PROJ} is missing, expected shape [24, 10]"),
    "missing expert": (lambda t: t.pop(UP), f"tensor {UP} is missing, expected shape [12, 24]"),
    "missing head": (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
    "transposed": (
        lambda t: t.update({O_PROJ: t[O_PROJ].T}),
        "expected shape [24, 10] by config.json, got [10, 24]",
    ),
    "expert shape": (
        lambda t: t.update({UP: t[UP][1:]}),
        f"tensor {UP}: expected shape [12, 24] by config.json",
    ),
    "wrong dtype": (
        lambda t: t.update({O_PROJ: t[O_PROJ].to(torch.int8)}),
        f"tensor {O_PROJ}: expected dtype BF16, F16, F32, got I8",
    ),
    "unexpected": (lambda t: t.update(surprise=torch.zeros(2)), "unexpected tensor 'surprise' (F32 [2])"),
    "expert too many": (
        lambda t: t.update({UP.replace(".3.", ".6."): t[UP]}),
        f"unexpected tensor {UP.replace('.3.', '.6.')!r} (BF16 [12, 24])",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_one_clear_line(tmp_path: Path, tensors: Tensors, change: Change, message: str) -> None:
    changed = dict(tensors)
    change(changed)
    with pytest.raises(InvalidInputError) as caught:
        open_model(save_model(tmp_path, CONFIG, changed))
    assert message in str(caught.value)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stacked_with_wrong_number_of_experts(tmp_path: Path, tensors: Tensors) -> None:
    stacked = stack_experts(tensors, CONFIG, fuse=True)
    name = "model.layers.2.mlp.experts.gate_up_proj"
    stacked[name] = stacked[name][:5]
    with pytest.raises(
        InvalidInputError, match=r"expected shape \[6, 24, 24\] by config.json, got \[5, 24, 24\]"
    ):
        open_model(save_model(tmp_path, CONFIG, stacked))


def test_directory_errors(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(InvalidInputError, match="no such model directory"):
        open_model(tmp_path / "nowhere")
    save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(InvalidInputError, match=r"config\.json: no such file"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptFileError, match="not valid JSON"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config(architectures=["X"])))
    with pytest.raises(UnsupportedModelError, match="architecture X is not supported"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config(n_group=4)))
    with pytest.raises(InvalidInputError, match=r"config\.json: model config: n_group must be"):
        open_model(tmp_path)


def test_expert_out_of_range(tmp_path: Path, tensors: Tensors) -> None:
    source = open_model(save_model(tmp_path, CONFIG, tensors))
    with pytest.raises(IndexError, match="layer 1 has no expert 6"):
        source.read_expert(1, 6)


def test_survives_pickling(tmp_path: Path, tensors: Tensors) -> None:
    source = pickle.loads(pickle.dumps(open_model(save_model(tmp_path, CONFIG, tensors))))
    check_all(source, CONFIG, tensors)


def test_generation_config_and_tokenizer(nano_checkpoint: Path) -> None:
    source = open_model(nano_checkpoint)
    assert source.notices == []
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(source.tokenizer_files)
    assert {"config.json", "model.safetensors.index.json"} <= {file.name for file in source.files}
    assert len(source.tensors) == 57


def test_a_bundle_is_no_checkpoint(nano_bundle: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"{nano_bundle}: is a bundle, not a checkpoint"):
        open_model(nano_bundle)
