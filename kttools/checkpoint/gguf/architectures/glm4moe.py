"""glm4moe: GLM-4.5, 4.5-Air, 4.6, 4.7. A part of each head is rotated; the last layers are for prediction."""

from typing import Any

from kttools.checkpoint.gguf.header import GgufTensor
from kttools.checkpoint.gguf.metadata import Metadata
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError, UnsupportedModelError

from . import gqa
from .base import (
    BLOCK_NAMES,
    DENSE_NAMES,
    MODEL_NAMES,
    PREDICTION_NAMES,
    ROUTED_NAMES,
    SHARED_NAMES,
    Architecture,
    Key,
    layer_names,
    leading_dense_layers,
    unmet,
)

NAME = "glm4moe"
SIGMOID = 2
KEYS = (
    *gqa.KEYS,
    Key("n_shared_experts", "expert_shared_count", int, 0),
    Key("first_k_dense_replace", "leading_dense_block_count", int, 0),
    Key("routed_scaling_factor", "expert_weights_scale", float, 1.0),
    Key("norm_topk_prob", "expert_weights_norm", bool, False),
    Key("n_group", "expert_group_count", int, 1),
    Key("topk_group", "expert_group_used_count", int, 1),
)
NAMES = (
    *MODEL_NAMES,
    *(name for name in BLOCK_NAMES if "ffn_norm" not in name.gguf),
    *layer_names(("post_attention_norm.weight", "post_attention_layernorm.weight")),
    *DENSE_NAMES,
    *ROUTED_NAMES,
    *SHARED_NAMES,
    *gqa.PROJECTION_NAMES,
    *gqa.BIAS_NAMES,
    *gqa.HEAD_NORM_NAMES,
    *PREDICTION_NAMES,
)


def finish(metadata: Metadata, tensors: dict[str, GgufTensor], config: dict[str, Any]) -> list[str]:
    """Everything of config.json that is not one key of the file."""
    rotated = gqa.finish_attention(metadata, NAME, config)
    experts, size = gqa.expert_sizes(metadata, NAME, tensors)
    if metadata.integer(f"{NAME}.expert_gating_func", SIGMOID) != SIGMOID:
        raise UnsupportedModelError(f"{metadata.where}: {NAME}.expert_gating_func must be {SIGMOID}")
    if not 0 < rotated <= config["head_dim"]:
        expected = f"1..{config['head_dim']}"
        raise InvalidInputError(
            f"{metadata.where}: {NAME}.rope.dimension_count must be in {expected}, got {rotated}"
        )
    config["num_hidden_layers"] -= metadata.integer(f"{NAME}.nextn_predict_layers", 0)
    config |= {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "n_routed_experts": experts,
        "moe_intermediate_size": size,
        "partial_rotary_factor": rotated / config["head_dim"],
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
    }
    return []


def describe(model: ModelConfig) -> gqa.Described:
    keys: gqa.Described = {
        "leading_dense_block_count": leading_dense_layers(model),
        "expert_gating_func": SIGMOID,
    }
    return gqa.describe_attention(model) | keys


def gaps(model: ModelConfig) -> list[str]:
    needs = {
        "a sigmoid router with a correction bias": model.router == "sigmoid_bias_groups",
        "shared experts": model.n_shared_experts > 0,
    }
    return unmet(gqa.plain_needs(model) | needs)


ARCHITECTURE = Architecture(NAME, KEYS, NAMES, finish, describe, gaps)
