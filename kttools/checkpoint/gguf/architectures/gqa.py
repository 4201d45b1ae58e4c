"""What architectures with grouped-query attention share: names, keys, heads and rotary positions."""

from typing import Any

from kttools.checkpoint.gguf.header import GgufTensor
from kttools.checkpoint.gguf.metadata import Metadata
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError, UnsupportedModelError
from kttools_runtime.rope_scaling import LinearScaling, YarnScaling

from .base import COMMON_KEYS, Key, layer_names, leading_dense_layers

Described = dict[str, int | float | bool | str]

KEYS = (*COMMON_KEYS, Key("num_key_value_heads", "attention.head_count_kv"))
PROJECTION_NAMES = layer_names(
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
)
BIAS_NAMES = layer_names(
    ("attn_q.bias", "self_attn.q_proj.bias"),
    ("attn_k.bias", "self_attn.k_proj.bias"),
    ("attn_v.bias", "self_attn.v_proj.bias"),
)
HEAD_NORM_NAMES = layer_names(
    ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight"),
)


def finish_attention(metadata: Metadata, name: str, config: dict[str, Any], has_window: bool = False) -> int:
    """Sets head_dim and rope_scaling; the rotated dimensions of a head. has_window: the caller reads it."""
    heads = config["num_attention_heads"]
    if heads < 1:
        raise InvalidInputError(
            f"{metadata.where}: {name}.attention.head_count must be at least 1, got {heads}"
        )
    head_dim = metadata.integer(f"{name}.attention.key_length", config["hidden_size"] // heads)
    value_dim = metadata.integer(f"{name}.attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedModelError(
            f"{metadata.where}: {name}.attention.value_length {value_dim} other than key_length {head_dim}"
        )
    config["head_dim"] = head_dim
    scaling = _rope_scaling(metadata, name)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if not has_window and metadata.integer(f"{name}.attention.sliding_window", None):
        raise UnsupportedModelError(f"{metadata.where}: {name}.attention.sliding_window is not supported")
    return int(metadata.integer(f"{name}.rope.dimension_count", head_dim))


def expert_sizes(metadata: Metadata, name: str, tensors: dict[str, GgufTensor]) -> tuple[int, int]:
    """(experts, expert size); the size from the tensors where an old file has no key."""
    experts = metadata.integer(f"{name}.expert_count")
    found = next((t for t in tensors.values() if t.name.endswith(".ffn_gate_exps.weight")), None)
    stored = found.shape[1] if found and len(found.shape) == 3 else ...
    return experts, metadata.integer(f"{name}.expert_feed_forward_length", stored)


def must_rotate_whole_heads(metadata: Metadata, name: str, rotated: int, config: dict[str, Any]) -> None:
    if rotated != config["head_dim"]:
        problem = f"{name}.rope.dimension_count {rotated}, expected whole heads of {config['head_dim']}"
        raise UnsupportedModelError(f"{metadata.where}: {problem}")


def describe_attention(model: ModelConfig) -> Described:
    """Head sizes, experts and rotary positions of a file we write."""
    return {
        "attention.head_count_kv": model.num_key_value_heads,
        "attention.key_length": model.qk_head_dim,
        "attention.value_length": model.v_head_dim,
        "rope.dimension_count": model.qk_rope_head_dim,
        "expert_count": model.n_routed_experts,
        "expert_feed_forward_length": model.moe_intermediate_size,
    } | _describe_rope(model)


def plain_needs(model: ModelConfig) -> dict[str, bool]:
    """Grouped-query attention of whole layers, with nothing that only some architectures can say."""
    return {
        "grouped-query attention": model.attention == "gqa",
        "no sliding window": model.sliding_window is None,
        "no bias of o_proj": not model.attention_output_bias,
        "no attention sinks": not model.attention_sinks,
        "no biases of router or experts": not (model.router_bias or model.expert_bias),
        "rotary pairs apart": not model.rope_interleave,
    }


def softmax_needs(model: ModelConfig, norm_topk_prob: bool) -> dict[str, bool]:
    """A softmax router over all experts whose normalisation the architecture fixes."""
    return {
        "a softmax router without groups": model.router == "softmax_groups" and model.n_group == 1,
        f"norm_topk_prob {str(norm_topk_prob).lower()}": model.norm_topk_prob is norm_topk_prob,
    }


def all_layers_moe(model: ModelConfig) -> None:
    if leading_dense_layers(model):
        raise UnsupportedModelError("this GGUF architecture has no dense layers")


def _rope_scaling(metadata: Metadata, name: str) -> dict[str, Any] | None:
    prefix = f"{name}.rope.scaling."
    kind = metadata.text(prefix + "type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.number(prefix + "factor")}
    if kind != "yarn":
        raise UnsupportedModelError(f"{metadata.where}: {prefix}type {kind!r:.40} is not supported")
    return {
        "rope_type": "yarn",
        "factor": metadata.number(prefix + "factor"),
        "original_max_position_embeddings": metadata.integer(prefix + "original_context_length"),
        "beta_fast": metadata.number(prefix + "yarn_beta_fast", 32.0),
        "beta_slow": metadata.number(prefix + "yarn_beta_slow", 1.0),
    }


def _describe_rope(model: ModelConfig) -> Described:
    rope = model.rope_scaling
    prefix = "rope.scaling."
    if rope is None:
        return {}
    if isinstance(rope, LinearScaling):
        return {prefix + "type": "linear", prefix + "factor": rope.factor}
    is_usual = isinstance(rope, YarnScaling) and rope.mscale is None and rope.attention_factor is None
    if not isinstance(rope, YarnScaling) or not is_usual or rope.mscale_all_dim is not None:
        raise UnsupportedModelError("rope_scaling: GGUF has only linear and plain yarn for this architecture")
    return {
        prefix + "type": "yarn",
        prefix + "factor": rope.factor,
        prefix + "original_context_length": rope.original_max_position_embeddings,
        prefix + "yarn_beta_fast": rope.beta_fast,
        prefix + "yarn_beta_slow": rope.beta_slow,
    }
