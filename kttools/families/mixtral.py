"""Mixtral 8x7B and 8x22B.

Grouped-query attention without biases; every layer is MoE. The router takes the softmax over its best logits,
which is the softmax over all, normalised. Experts have intermediate_size and are called w1 (gate), w2 (down)
and w3 (up) on the hub; transformers 5 itself saves them as mlp.experts, stacked.
"""

from typing import Any

from kttools_runtime.config import ModelConfig

from . import config_keys as keys
from .base import ExpertLayout, Family, TensorSpec
from .canonical import canonical_tensors, renamed
from .config_reader import ConfigReader
from .layouts import left_out, one_per_expert, stacked
from .rope_keys import read_rope

RMS_NORM_EPS = 1e-5
ROPE_THETA = 1e6


def read_config(
    config: dict[str, Any], generation_config: dict[str, Any], where: str
) -> tuple[ModelConfig, list[str]]:
    """config.json (and generation_config.json, {} when absent) -> canonical config and notices.

    Raises InvalidInputError (missing key, wrong type or range) or UnsupportedModelError (a feature we lack).
    """
    reader = ConfigReader(config, where)
    rope = read_rope(reader, ROPE_THETA)
    window = reader.optional_integer("sliding_window")
    model = ModelConfig(
        **keys.base_arguments(reader, generation_config, RMS_NORM_EPS),
        **keys.gqa_arguments(reader, rope),
        **keys.softmax_router(norm_topk_prob=True),
        **(keys.window_everywhere(reader, window) if window is not None else {}),
        attention_bias=False,
        moe_layers=keys.every_layer(reader),
        moe_intermediate_size=reader.integer("intermediate_size"),
        n_routed_experts=reader.integer("num_local_experts"),
        n_shared_experts=0,
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
    )
    return model, keys.finish(reader, "Mixtral")


def device_tensors(config: ModelConfig) -> list[TensorSpec]:
    """The hub's router is block_sparse_moe.gate, transformers 5's mlp.gate."""
    return renamed(
        canonical_tensors(config), lambda name: name.replace(".mlp.", ".block_sparse_moe."), lambda name: name
    )


def experts_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def expert_layouts(config: ModelConfig) -> list[ExpertLayout]:
    names = (f"block_sparse_moe.experts.{{expert}}.{name}.weight" for name in ("w1", "w3", "w2"))
    return [one_per_expert(config, *names), *stacked(config, "mlp.experts.")]


FAMILY = Family(
    name="mixtral",
    title="Mixtral",
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    read_config=read_config,
    device_tensors=device_tensors,
    expert_layouts=expert_layouts,
    experts_prefix=experts_prefix,
    left_out=left_out,
)
