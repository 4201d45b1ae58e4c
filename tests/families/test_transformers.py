"""Checkpoints that transformers itself writes, in its original and its in-memory form, read back exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kttools.families import open_model
from tests.forge import config

transformers = pytest.importorskip("transformers")

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.8,
    "mscale_all_dim": 0.6,
}
CASES: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": None, "attention_bias": True, "first_k_dense_replace": 0},
    {"n_shared_experts": 0, "tie_word_embeddings": True, "rope_scaling": YARN, "norm_topk_prob": False},
    {"n_group": 1, "topk_group": 1, "rope_interleave": False, "first_k_dense_replace": 3},
]


@pytest.mark.parametrize("original", [True, False], ids=["hub names", "fused"])
@pytest.mark.parametrize("changes", CASES, ids=lambda value: "-".join(value) or "plain")
def test_reads_what_transformers_saves(tmp_path: Path, changes: dict[str, Any], original: bool) -> None:
    values = config(**changes)
    for key in (
        "architectures",
        "model_type",
        "torch_dtype",
        "scoring_func",
        "topk_method",
        "moe_layer_freq",
    ):
        values.pop(key)
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**values)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, save_original_format=original)
    state = model.state_dict()

    source = open_model(tmp_path)
    for tensor in source.tensors:
        assert torch.equal(tensor.read(), state[tensor.name].to(tensor.read().dtype)), tensor.name
    for layer in source.moe_layers:
        prefix = f"model.layers.{layer}.mlp.experts."
        for expert in range(source.config.n_routed_experts):
            gate, up, down = source.read_expert(layer, expert)
            assert torch.equal(torch.cat([gate, up]), state[prefix + "gate_up_proj"][expert])
            assert torch.equal(down, state[prefix + "down_proj"][expert])

    attention = model.model.layers[0].self_attn
    rotary = model.model.rotary_emb
    assert source.config.softmax_scale == pytest.approx(attention.scaling)
    assert source.config.rope_cos_sin_scale == pytest.approx(rotary.attention_scaling)
    assert source.config.rope_interleave == values.get("rope_interleave", True)
