"""Qwen3-MoE: Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder of that architecture.

Grouped-query attention with a norm per head; attention_bias adds a bias to all four projections. With
use_sliding_window every layer has the window.
"""

from typing import Any

from kttools_runtime.config import ModelConfig

from . import config_keys as keys
from .base import Family
from .canonical import canonical_tensors
from .config_reader import ConfigReader
from .layouts import expert_layouts, experts_prefix, left_out
from .rope_keys import read_rope


def read_config(
    config: dict[str, Any], generation_config: dict[str, Any], where: str
) -> tuple[ModelConfig, list[str]]:
    """config.json (and generation_config.json, {} when absent) -> canonical config and notices.

    Raises InvalidInputError (missing key, wrong type or range) or UnsupportedModelError (a feature we lack).
    """
    reader = ConfigReader(config, where)
    rope = read_rope(reader)
    has_bias = reader.boolean("attention_bias", False)
    reader.optional_integer("max_window_layers")  # of the dense Qwen3; the MoE code never reads it
    model = ModelConfig(
        **keys.base_arguments(reader, generation_config),
        **keys.gqa_arguments(reader, rope),
        **keys.softmax_router(reader.boolean("norm_topk_prob", False)),
        **_window(reader),
        attention_bias=has_bias,
        attention_output_bias=has_bias,
        qk_norm=True,
        moe_layers=keys.every_sparse_step(reader),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        n_routed_experts=keys.num_experts(reader),
        n_shared_experts=0,
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
    )
    return model, keys.finish(reader, "Qwen3-MoE")


def _window(reader: ConfigReader) -> dict[str, Any]:
    window = reader.optional_integer("sliding_window")
    if not reader.boolean("use_sliding_window", False) or window is None:
        return {}
    return keys.window_everywhere(reader, window)


FAMILY = Family(
    name="qwen3_moe",
    title="Qwen3-MoE",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    read_config=read_config,
    device_tensors=canonical_tensors,
    expert_layouts=expert_layouts,
    experts_prefix=experts_prefix,
    left_out=left_out,
)
