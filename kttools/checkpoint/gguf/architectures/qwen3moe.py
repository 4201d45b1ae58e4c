"""qwen3moe: Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder. llama.cpp always normalises the chosen weights."""

from typing import Any

from kttools.checkpoint.gguf.header import GgufTensor
from kttools.checkpoint.gguf.metadata import Metadata
from kttools_runtime.config import ModelConfig

from . import gqa
from .base import BLOCK_NAMES, MODEL_NAMES, ROUTED_NAMES, Architecture, unmet

NAME = "qwen3moe"
NAMES = (*MODEL_NAMES, *BLOCK_NAMES, *ROUTED_NAMES, *gqa.PROJECTION_NAMES, *gqa.HEAD_NORM_NAMES)


def finish(metadata: Metadata, tensors: dict[str, GgufTensor], config: dict[str, Any]) -> list[str]:
    """Everything of config.json that is not one key of the file."""
    rotated = gqa.finish_attention(metadata, NAME, config)
    gqa.must_rotate_whole_heads(metadata, NAME, rotated, config)
    experts, size = gqa.expert_sizes(metadata, NAME, tensors)
    config |= {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "moe_intermediate_size": size,
        "norm_topk_prob": True,
    }
    return []


def describe(model: ModelConfig) -> gqa.Described:
    gqa.all_layers_moe(model)
    return gqa.describe_attention(model)


def gaps(model: ModelConfig) -> list[str]:
    needs = {
        "a norm of query and key": model.qk_norm,
        "no biases of attention": not model.attention_bias,
        "no shared experts": model.n_shared_experts == 0,
        "whole heads rotated": model.qk_nope_head_dim == 0,
    }
    return unmet(gqa.plain_needs(model) | gqa.softmax_needs(model, True) | needs)


ARCHITECTURE = Architecture(NAME, gqa.KEYS, NAMES, finish, describe, gaps)
