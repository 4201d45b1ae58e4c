"""deepseek2: DeepSeek-V2, V2-Lite, V3, R1, V3.1, Kimi-K2.

llama.cpp stores the attention's kv_b_proj in one of three layouts: attn_kv_b alone (files before April 2025),
attn_k_b (transposed per head) and attn_v_b (since then), or all three (ik_llama.cpp). With the second the
lengths of keys and values are those of the compressed cache, and the heads' own carry the suffix _mla.
"""

from typing import Any

from kttools.checkpoint.gguf.header import GgufTensor
from kttools.checkpoint.gguf.metadata import Metadata
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError, UnsupportedModelError
from kttools_runtime.rope_scaling import RopeScaling, YarnScaling

from .base import (
    BLOCK_NAMES,
    COMMON_KEYS,
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

NAME = "deepseek2"
SOFTMAX, SIGMOID = 1, 2
# n_group, topk_group by number of experts, for files older than these keys: the values of the only models
# of that size (DeepSeek-V2 and V3).
GROUPS_OF_OLD_FILES = {160: (8, 3), 256: (8, 4)}
# What llama.cpp's files hold for DeepSeek's mscale_all_dim: a tenth of it.
YARN_LOG_SHARE = 0.1

KEYS = (
    *COMMON_KEYS,
    Key("moe_intermediate_size", "expert_feed_forward_length"),
    Key("n_routed_experts", "expert_count"),
    Key("n_shared_experts", "expert_shared_count", int, 0),
    Key("first_k_dense_replace", "leading_dense_block_count", int, 0),
    Key("routed_scaling_factor", "expert_weights_scale", float, 1.0),
    Key("norm_topk_prob", "expert_weights_norm", bool, False),
    Key("kv_lora_rank", "attention.kv_lora_rank"),
    Key("q_lora_rank", "attention.q_lora_rank", int, None),
    Key("qk_rope_head_dim", "rope.dimension_count"),
)
NAMES = (
    *MODEL_NAMES,
    *BLOCK_NAMES,
    *DENSE_NAMES,
    *ROUTED_NAMES,
    *SHARED_NAMES,
    *PREDICTION_NAMES,
    *layer_names(
        ("attn_q.weight", "self_attn.q_proj.weight"),
        ("attn_q_a.weight", "self_attn.q_a_proj.weight"),
        ("attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight"),
        ("attn_q_b.weight", "self_attn.q_b_proj.weight"),
        ("attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight"),
        ("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight"),
        ("attn_kv_b.weight", "self_attn.kv_b_proj.weight"),
    ),
)


def finish(metadata: Metadata, tensors: dict[str, GgufTensor], config: dict[str, Any]) -> list[str]:
    """Everything of config.json that is not one key of the file."""
    notices = _routing(metadata, config)
    config["num_key_value_heads"] = config["num_attention_heads"]
    config["num_hidden_layers"] -= metadata.integer(f"{NAME}.nextn_predict_layers", 0)
    key_length = metadata.integer(f"{NAME}.attention.key_length_mla", None)
    suffix = "" if key_length is None else "_mla"
    key_length = metadata.integer(f"{NAME}.attention.key_length{suffix}")
    config["qk_nope_head_dim"] = key_length - config["qk_rope_head_dim"]
    config["v_head_dim"] = metadata.integer(f"{NAME}.attention.value_length{suffix}")
    if config["model_type"] == "deepseek_v3":  # V2's config has no such key: its pairs always lie together
        config["rope_interleave"] = True
    rope = _rope_scaling(metadata)
    if rope is not None:
        config["rope_scaling"] = rope
    return notices


def _routing(metadata: Metadata, config: dict[str, Any]) -> list[str]:
    """Router and groups; notices for what an old file leaves open."""
    gating = metadata.integer(f"{NAME}.expert_gating_func", SOFTMAX)
    if gating not in (SOFTMAX, SIGMOID):
        raise UnsupportedModelError(
            f"{metadata.where}: {NAME}.expert_gating_func {gating} is not supported, expected 1 or 2"
        )
    version, scoring = ("V3", "sigmoid") if gating == SIGMOID else ("V2", "softmax")
    groups, notices = _groups(metadata, config["n_routed_experts"])
    methods = {"V3": "noaux_tc", "V2": "group_limited_greedy" if groups[0] > 1 else "greedy"}
    config |= {
        "architectures": [f"Deepseek{version}ForCausalLM"],
        "model_type": f"deepseek_{version.lower()}",
        "scoring_func": scoring,
        "topk_method": methods[version],
        "n_group": groups[0],
        "topk_group": groups[1],
    }
    return notices


def _groups(metadata: Metadata, experts: int) -> tuple[tuple[int, int], list[str]]:
    n_group = metadata.integer(f"{NAME}.expert_group_count", None)
    if n_group is not None and n_group > 0:
        return (n_group, metadata.integer(f"{NAME}.expert_group_used_count")), []
    groups = GROUPS_OF_OLD_FILES.get(experts, (1, 1))
    if n_group is not None or groups == (1, 1):
        return (1, 1), []
    text = f"n_group {groups[0]}, topk_group {groups[1]}"
    return groups, [f"{metadata.where}: an old file without routing groups: taken as {text}"]


def _rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    """rope_scaling of config.json; both mscales are equal in every model of this architecture."""
    prefix = f"{NAME}.rope.scaling."
    kind = metadata.text(prefix + "type", "none")
    if kind == "none":
        return None
    if kind != "yarn":
        raise UnsupportedModelError(f"{metadata.where}: {prefix}type {kind!r:.40} is not supported")
    attention_factor = metadata.number(prefix + "yarn_attn_factor", None)
    rope = {
        "type": "yarn",
        "factor": metadata.number(prefix + "factor"),
        "original_max_position_embeddings": metadata.integer(prefix + "original_context_length"),
        "beta_fast": metadata.number(prefix + "yarn_beta_fast", 32.0),
        "beta_slow": metadata.number(prefix + "yarn_beta_slow", 1.0),
    }
    if attention_factor not in (None, 1.0):
        raise InvalidInputError(
            f"{metadata.where}: {prefix}yarn_attn_factor must be 1, got {attention_factor}"
        )
    share = metadata.number(prefix + "yarn_log_multiplier", None)
    if share is not None:
        rope["mscale"] = rope["mscale_all_dim"] = round(share / YARN_LOG_SHARE, 6)
    return rope


def describe(model: ModelConfig) -> dict[str, int | float | bool | str]:
    """Keys of a file in the attn_k_b + attn_v_b layout; lengths as llama.cpp takes them."""
    rank, rope = model.kv_lora_rank, model.qk_rope_head_dim
    keys: dict[str, int | float | bool | str] = {
        "leading_dense_block_count": leading_dense_layers(model),
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": model.qk_head_dim,
        "attention.value_length_mla": model.v_head_dim,
        "expert_gating_func": SIGMOID if model.router == "sigmoid_bias_groups" else SOFTMAX,
    }
    if model.n_group > 1:
        keys["expert_group_count"] = model.n_group
        keys["expert_group_used_count"] = model.topk_group
    return keys | _describe_rope(model.rope_scaling)


def _describe_rope(rope: RopeScaling | None) -> dict[str, int | float | bool | str]:
    if rope is None:
        return {}
    if not isinstance(rope, YarnScaling):
        raise UnsupportedModelError(f"rope_scaling: {NAME} has only yarn, got {type(rope).__name__}")
    if rope.attention_factor is not None or rope.mscale != rope.mscale_all_dim:
        raise UnsupportedModelError("rope_scaling: GGUF holds one mscale, equal to mscale_all_dim")
    keys: dict[str, int | float | bool | str] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope.factor,
        "rope.scaling.original_context_length": rope.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": rope.beta_fast,
        "rope.scaling.yarn_beta_slow": rope.beta_slow,
    }
    if rope.mscale_all_dim is not None:
        keys["rope.scaling.yarn_log_multiplier"] = YARN_LOG_SHARE * rope.mscale_all_dim
    return keys


def gaps(model: ModelConfig) -> list[str]:
    needs = {
        "multi-head latent attention": model.attention == "mla",
        "no biases of attention": not model.attention_bias,
        "rotary pairs together (rope_interleave)": model.rope_interleave,
    }
    return unmet(needs)


ARCHITECTURE = Architecture(NAME, KEYS, NAMES, finish, describe, gaps)
