"""llama with experts: Mixtral. Rows of query and key heads are interleaved; the chosen weights normalised."""

from typing import Any

from kttools.checkpoint.gguf.header import GgufTensor
from kttools.checkpoint.gguf.metadata import Metadata
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import UnsupportedModelError

from . import gqa
from .base import BLOCK_NAMES, MODEL_NAMES, ROUTED_NAMES, Architecture, Name, Transform, unmet

NAME = "llama"
PREFIX = "model.layers.{layer}.self_attn."
EXPERTS = "model.layers.{layer}.block_sparse_moe.experts."
NAMES = (
    *MODEL_NAMES,
    *BLOCK_NAMES,
    *ROUTED_NAMES,
    Name("blk.{layer}.attn_q.weight", PREFIX + "q_proj.weight", Transform.QUERY_HALVES),
    Name("blk.{layer}.attn_k.weight", PREFIX + "k_proj.weight", Transform.KEY_HALVES),
    Name("blk.{layer}.attn_v.weight", PREFIX + "v_proj.weight"),
    # Files of early 2024 have a tensor per expert.
    *(
        Name(f"blk.{{layer}}.ffn_{gguf}.{{expert}}.weight", f"{EXPERTS}{{expert}}.{hub}.weight")
        for gguf, hub in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    ),
)


def finish(metadata: Metadata, tensors: dict[str, GgufTensor], config: dict[str, Any]) -> list[str]:
    """Everything of config.json that is not one key of the file."""
    if f"{NAME}.expert_count" not in metadata:
        raise UnsupportedModelError(f"{metadata.where}: a {NAME} model without experts is not supported")
    rotated = gqa.finish_attention(metadata, NAME, config)
    gqa.must_rotate_whole_heads(metadata, NAME, rotated, config)
    config |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": metadata.integer(f"{NAME}.expert_count"),
    }
    return []


def describe(model: ModelConfig) -> gqa.Described:
    gqa.all_layers_moe(model)
    keys: gqa.Described = {"feed_forward_length": model.moe_intermediate_size}
    return gqa.describe_attention(model) | keys


def gaps(model: ModelConfig) -> list[str]:
    needs = {
        "no norm of query and key": not model.qk_norm,
        "no biases of attention": not model.attention_bias,
        "no shared experts": model.n_shared_experts == 0,
        "whole heads rotated": model.qk_nope_head_dim == 0,
    }
    return unmet(gqa.plain_needs(model) | gqa.softmax_needs(model, True) | needs)


ARCHITECTURE = Architecture(NAME, gqa.KEYS, NAMES, finish, describe, gaps)
