"""qwen2moe: Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B. llama.cpp never normalises the chosen weights."""

from typing import Any

from kttools.checkpoint.gguf.header import GgufTensor
from kttools.checkpoint.gguf.metadata import Metadata
from kttools_runtime.config import ModelConfig

from . import gqa
from .base import BLOCK_NAMES, MODEL_NAMES, ROUTED_NAMES, Architecture, Name, Transform, unmet

NAME = "qwen2moe"
LAYER = "model.layers.{layer}.mlp."
SHARED_NAMES = tuple(
    Name(
        f"blk.{{layer}}.ffn_{name}_shexp.weight",
        f"{LAYER}shared_expert.{name}_proj.weight",
        canonical=f"{LAYER}shared_experts.{name}_proj.weight",
    )
    for name in ("gate", "up", "down")
)
SHARED_GATE = Name(
    "blk.{layer}.ffn_gate_inp_shexp.weight", LAYER + "shared_expert_gate.weight", Transform.ONE_ROW
)
NAMES = (
    *MODEL_NAMES,
    *BLOCK_NAMES,
    *ROUTED_NAMES,
    *gqa.PROJECTION_NAMES,
    *gqa.BIAS_NAMES,
    *SHARED_NAMES,
    SHARED_GATE,
)


def finish(metadata: Metadata, tensors: dict[str, GgufTensor], config: dict[str, Any]) -> list[str]:
    """Everything of config.json that is not one key of the file."""
    rotated = gqa.finish_attention(metadata, NAME, config)
    gqa.must_rotate_whole_heads(metadata, NAME, rotated, config)
    experts, size = gqa.expert_sizes(metadata, NAME, tensors)
    shared = tensors.get("blk.0.ffn_gate_shexp.weight")
    stored = shared.shape[0] if shared else ...
    config |= {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": experts,
        "moe_intermediate_size": size,
        "shared_expert_intermediate_size": metadata.integer(
            f"{NAME}.expert_shared_feed_forward_length", stored
        ),
        "norm_topk_prob": False,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
    }
    return []


def describe(model: ModelConfig) -> gqa.Described:
    gqa.all_layers_moe(model)
    shared: gqa.Described = {"expert_shared_feed_forward_length": model.shared_intermediate_size}
    return gqa.describe_attention(model) | shared


def gaps(model: ModelConfig) -> list[str]:
    needs = {
        "no norm of query and key": not model.qk_norm,
        "shared experts with a gate": model.shared_expert_gate,
        "whole heads rotated": model.qk_nope_head_dim == 0,
    }
    return unmet(gqa.plain_needs(model) | gqa.softmax_needs(model, False) | needs)


ARCHITECTURE = Architecture(NAME, gqa.KEYS, NAMES, finish, describe, gaps)
