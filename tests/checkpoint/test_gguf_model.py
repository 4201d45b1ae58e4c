"""GGUF as a model: tensors against NumPy, the three kv_b layouts, every ggml type, tokenizer, old files."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from kttools.checkpoint.gguf import is_gguf, open_gguf
from kttools.checkpoint.gguf.architectures.base import _split
from kttools.checkpoint.gguf.header import read_gguf_header
from kttools.checkpoint.gguf.types import TYPES
from kttools.checkpoint.gguf.views import read_rows
from kttools.families import open_model
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.tokenizer import Tokenizer

from .gguf_forge import ARRAY, F32, I32, STRING, TOKENS, U32, Image, Tensor, deepseek2, deepseek2_arrays

HUB = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "blk.1.attn_q_b.weight": "model.layers.1.self_attn.q_b_proj.weight",
    "blk.0.attn_kv_a_mqa.weight": "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "blk.1.ffn_up_shexp.weight": "model.layers.1.mlp.shared_experts.up_proj.weight",
    "blk.1.ffn_gate_inp.weight": "model.layers.1.mlp.gate.weight",
    "blk.1.exp_probs_b.bias": "model.layers.1.mlp.gate.e_score_correction_bias",
    "blk.1.attn_norm.weight": "model.layers.1.input_layernorm.weight",
}


@pytest.mark.parametrize("layout", ["kv_b", "k_b + v_b", "both"])
def test_tensors_of_every_layout(tmp_path: Path, layout: str) -> None:
    changes: dict[str, Any] = {}
    if layout == "kv_b":  # files of that time have the heads' own lengths and no _mla keys
        changes = {f"deepseek2.attention.{kind}_length_mla": ... for kind in ("key", "value")}
        changes |= {"deepseek2.attention.key_length": (U32, 12), "deepseek2.attention.value_length": (U32, 6)}
    source = open_model(deepseek2(layout, **changes).save(tmp_path / "x.gguf"))
    arrays = deepseek2_arrays(layout)
    joint = deepseek2_arrays("kv_b")
    got = {tensor.name: tensor for tensor in source.tensors}
    for name, hub in HUB.items():
        assert torch.equal(got[hub].read(), torch.from_numpy(arrays[name])), name
    for layer in (0, 1):
        tensor = got[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
        expected = torch.from_numpy(joint[f"blk.{layer}.attn_kv_b.weight"])
        assert torch.equal(tensor.read(), expected)
        for begin, end in ((0, 1), (7, 9), (13, 15), (0, 28), (27, 28), (5, 5)):
            assert torch.equal(tensor.read_rows(begin, end), expected[begin:end])
    for expert in range(4):
        parts = source.read_expert(1, expert)
        for part, name in zip(parts, ("gate", "up", "down"), strict=True):
            assert torch.equal(part, torch.from_numpy(arrays[f"blk.1.ffn_{name}_exps.weight"][expert]))
    aside = [line for line in source.notices if "attn_k_b and attn_v_b" in line]
    assert bool(aside) == (layout == "both")


def test_config_from_metadata(tmp_path: Path) -> None:
    config = open_model(deepseek2().save(tmp_path / "x.gguf")).config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (100, 32, 2)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (8, 4, 6)
    assert config.moe_layers == (1,)
    assert (config.n_group, config.topk_group, config.routed_scaling_factor) == (2, 1, 2.5)
    assert config.rms_norm_eps == 1e-6
    assert config.eos_token_ids == (98,)
    assert config.norm_topk_prob
    assert not config.tie_word_embeddings


def test_yarn_and_prediction_layers(tmp_path: Path) -> None:
    prefix = "deepseek2.rope.scaling."
    changes = {
        prefix + "type": (STRING, "yarn"),
        prefix + "factor": (F32, 40.0),
        prefix + "original_context_length": (U32, 4096),
        prefix + "yarn_log_multiplier": (F32, 0.0707),
        "deepseek2.block_count": (U32, 3),
        "deepseek2.nextn_predict_layers": (U32, 1),
    }
    image = deepseek2(**changes)
    image.tensors.append(Tensor("blk.2.nextn.eh_proj.weight"))
    image.tensors.append(Tensor("blk.2.attn_norm.weight"))
    source = open_model(image.save(tmp_path / "x.gguf"))
    rope = source.config.to_dict()["rope_scaling"]
    assert (rope["mscale"], rope["mscale_all_dim"], rope["factor"]) == (0.707, 0.707, 40.0)
    assert (rope["beta_fast"], rope["beta_slow"]) == (32.0, 1.0)
    assert source.config.num_hidden_layers == 2
    assert any("multi-token-prediction layer 2 (2 tensors)" in line for line in source.notices)


@pytest.mark.parametrize(("experts", "expected"), [(4, (1, 1)), (160, (8, 3)), (256, (8, 4))])
def test_old_files_without_groups(tmp_path: Path, experts: int, expected: tuple[int, int]) -> None:
    changes: dict[str, Any] = {
        "deepseek2.expert_group_count": ...,
        "deepseek2.expert_group_used_count": ...,
        "deepseek2.expert_count": (U32, experts),
    }
    model = open_gguf(deepseek2(**changes).save(tmp_path / "x.gguf"))
    assert (model.config["n_group"], model.config["topk_group"]) == expected
    assert bool(model.notices) == (expected != (1, 1))


def test_an_unknown_tensor_is_refused_by_its_own_name(tmp_path: Path) -> None:
    image = deepseek2()
    image.tensors.append(Tensor("blk.1.attn_sinks.weight"))
    with pytest.raises(
        InvalidInputError, match=r"unexpected tensor 'blk.1.attn_sinks.weight' \(F32 \[32\]\)"
    ):
        open_model(image.save(tmp_path / "x.gguf"))


def test_layers_in_names() -> None:
    assert _split("blk.12.attn_q.weight") == ("blk.{layer}.attn_q.weight", "12")
    assert _split("token_embd.weight") == ("token_embd.weight", "")


@pytest.mark.parametrize("kind", [kind for kind in TYPES.values() if kind.dtype], ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_gguf_package_does(tmp_path: Path, kind: Any) -> None:
    """Random bytes are valid blocks of any type; some scales are NaN, on both sides."""
    qtype = gguf.GGMLQuantizationType(kind.number)
    assert gguf.GGML_QUANT_SIZES[qtype] == (kind.block, kind.bytes)
    columns = 2 * max(kind.block, 32)
    rng = np.random.default_rng(kind.number)
    data = rng.integers(0, 256, (6, kind.row_bytes(columns)), dtype=np.uint8)
    tensor = Tensor("a", (columns, 3, 2), kind.number, data.tobytes())
    found = read_gguf_header(Image([], [tensor]).save(tmp_path / "x.gguf")).tensors["a"]
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(np.asarray(gguf.quants.dequantize(data, qtype))).view(2, 3, columns)
    for begin, end in ((0, 2), (1, 2), (1, 1)):
        got = read_rows(found, begin, end)
        assert got.shape == (end - begin, 3, columns)
        assert torch.allclose(got.float(), expected[begin:end].float(), rtol=0, atol=0, equal_nan=True)


def test_unreadable_types_are_refused(tmp_path: Path) -> None:
    image = deepseek2()
    image.tensors[2] = Tensor("output_norm.weight", (32,), 26, bytes(128))
    with pytest.raises(InvalidInputError, match="expected dtype BF16, F16, F32, got I32"):
        open_model(image.save(tmp_path / "x.gguf"))


def test_raw_experts(tmp_path: Path) -> None:
    """The undecoded bytes of an expert, for packs that keep a ggml type's numbers."""
    model = open_gguf(deepseek2().save(tmp_path / "x.gguf"))
    array = deepseek2_arrays()["blk.1.ffn_up_exps.weight"]
    kind, data = model.weights.raw_slice("model.layers.1.mlp.experts.up_proj", 2)
    assert kind.name == "F32"
    assert data.tobytes() == array[2].tobytes()
    with pytest.raises(IndexError, match="has no slice 4"):
        model.weights.raw_slice("model.layers.1.mlp.experts.up_proj", 4)
    with pytest.raises(InvalidInputError, match="stored in another layout"):
        model.weights.raw_slice("model.layers.1.self_attn.kv_b_proj.weight", 0)


def test_file_cut_after_opening(tmp_path: Path) -> None:
    file = deepseek2().save(tmp_path / "x.gguf")
    source = open_model(file)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(InvalidInputError, match="truncated at byte"):
        source.read_expert(1, 3)


def tokenizer(image: Image, folder: Path) -> Tokenizer:
    model = open_gguf(image.save(folder / "x.gguf"))
    for name, data in model.tokenizer_data.items():
        (folder / name).write_bytes(data)
    return Tokenizer(folder)


def test_tokenizer(tmp_path: Path) -> None:
    found = tokenizer(deepseek2(), tmp_path)
    ids = found.encode("a th<u>")
    assert [TOKENS[i] for i in ids] == ["<s>", "a", "\u0120th", "<u>"]
    assert found.decode(ids) == "a th<u>"
    assert (found.bos_token_id, found.eos_token_id) == (97, 98)
    assert found.render_chat([{"role": "user", "content": "hi"}]) == "hi"
    assert found.generation_config == {"bos_token_id": 97, "eos_token_id": 98}


def test_tokenizer_without_bos_and_with_two_ends(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "tokenizer.ggml.add_bos_token": ...,
        "tokenizer.ggml.eot_token_id": (U32, 99),
        "tokenizer.ggml.padding_token_id": (U32, 2**32 - 1),
        "general.sampling.temp": (F32, 0.6),
        "tokenizer.ggml.token_type": (ARRAY, (I32, [1] * 97 + [3, 3, 5])),
    }
    found = tokenizer(deepseek2(**changes), tmp_path)
    assert found.encode("a", add_special_tokens=True) == [TOKENS.index("a")]
    assert found.token_to_id("<u>") is None
    assert found.special_tokens["pad_token"] is None
    assert found.generation_config["eos_token_id"] == [98, 99]
    assert found.generation_config["temperature"] == 0.6


def test_weights_for_a_config_elsewhere(tmp_path: Path, nano_checkpoint: Path) -> None:
    """--model_path for config and tokenizer, --gguf_path for the weights."""
    file = deepseek2(**{"tokenizer.ggml.pre": (STRING, "unknown")}).save(tmp_path / "x.gguf")
    own = open_gguf(file, with_tokenizer=False)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(own.config))
    (folder / "tokenizer.json").write_bytes((nano_checkpoint / "tokenizer.json").read_bytes())
    source = open_model(folder, file)
    assert source.tokenizer_names == ["tokenizer.json"]
    assert {path.name for path in source.files} == {"config.json", "x.gguf"}
    expected = deepseek2_arrays()["output.weight"]
    assert torch.equal(source.checkpoint.read("lm_head.weight"), torch.from_numpy(expected))


def test_which_paths_are_gguf(tmp_path: Path) -> None:
    assert not is_gguf(tmp_path)
    deepseek2().save(tmp_path / "x.gguf")
    assert is_gguf(tmp_path)
    assert is_gguf(tmp_path / "x.gguf")
    (tmp_path / "model.safetensors").touch()
    assert not is_gguf(tmp_path)
