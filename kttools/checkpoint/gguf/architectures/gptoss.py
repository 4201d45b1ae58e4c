"""gpt-oss: experts in MXFP4 with biases, gate and up apart; the first of every two layers has the window.

Written only as far as llama.cpp's loader can read it back; alpha and limit of the gate are its constants.
"""

from typing import Any

from kttools.checkpoint.gguf.header import GgufTensor
from kttools.checkpoint.gguf.metadata import Metadata
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import UnsupportedModelError

from . import gqa
from .base import MODEL_NAMES, ROUTED_NAMES, Architecture, Name, layer_names, unmet

NAME = "gpt-oss"
MLP = "model.layers.{layer}.mlp."
PERIOD = 2
NAMES = (
    *MODEL_NAMES,
    *layer_names(
        ("attn_norm.weight", "input_layernorm.weight"),
        ("post_attention_norm.weight", "post_attention_layernorm.weight"),
        ("attn_output.weight", "self_attn.o_proj.weight"),
        ("attn_output.bias", "self_attn.o_proj.bias"),
        ("attn_sinks.weight", "self_attn.sinks"),
        ("ffn_gate_exps.bias", "mlp.experts.gate_proj_bias"),
        ("ffn_up_exps.bias", "mlp.experts.up_proj_bias"),
        ("ffn_down_exps.bias", "mlp.experts.down_proj_bias"),
    ),
    *gqa.PROJECTION_NAMES,
    *gqa.BIAS_NAMES,
    Name("blk.{layer}.ffn_gate_inp.weight", MLP + "router.weight", canonical=MLP + "gate.weight"),
    Name("blk.{layer}.ffn_gate_inp.bias", MLP + "router.bias", canonical=MLP + "gate.bias"),
    *(name for name in ROUTED_NAMES if "_exps" in name.gguf),
)


def finish(metadata: Metadata, tensors: dict[str, GgufTensor], config: dict[str, Any]) -> list[str]:
    """Everything of config.json that is not one key of the file."""
    window = metadata.integer(f"{NAME}.attention.sliding_window")
    rotated = gqa.finish_attention(metadata, NAME, config, has_window=True)
    gqa.must_rotate_whole_heads(metadata, NAME, rotated, config)
    experts, size = gqa.expert_sizes(metadata, NAME, tensors)
    scaling = config.get("rope_scaling", {"rope_type": "default"})
    if scaling["rope_type"] == "yarn":
        scaling["truncate"] = False
    config |= {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": experts,
        "intermediate_size": size,
        "sliding_window": window,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "rope_scaling": scaling,
    }
    return []


def describe(model: ModelConfig) -> gqa.Described:
    gqa.all_layers_moe(model)
    if model.sliding_window_layers != tuple(range(0, model.num_hidden_layers, PERIOD)):
        raise UnsupportedModelError("this GGUF architecture has its window in the first of every two layers")
    scaling = model.rope_scaling
    if scaling is not None and getattr(scaling, "truncate", False):
        raise UnsupportedModelError("this GGUF architecture has yarn without truncation")
    window: gqa.Described = {"attention.sliding_window": model.sliding_window or 0}
    return gqa.describe_attention(model) | window


def gaps(model: ModelConfig) -> list[str]:
    needs = {"attention sinks": model.attention_sinks, "biases of the experts": model.expert_bias}
    needs |= {"swiglu_alpha 1.702": model.swiglu_alpha == 1.702, "swiglu_limit 7": model.swiglu_limit == 7.0}
    return unmet(needs | {"a router bias": model.router_bias} | gqa.softmax_needs(model, True))


ARCHITECTURE = Architecture(NAME, gqa.KEYS, NAMES, finish, describe, gaps)
