"""Qwen2-MoE: Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B.

Grouped-query attention with biases on q, k and v (qkv_bias); one shared expert of its own width, multiplied
by a sigmoid gate. Versions of transformers disagree which layers a sliding window is for, so it must come
with layer_types; released models have none.
"""

from typing import Any

from kttools_runtime.config import ModelConfig

from . import config_keys as keys
from .base import Family, TensorSpec
from .canonical import canonical_tensors, renamed
from .config_reader import ConfigReader
from .layouts import expert_layouts, experts_prefix, left_out
from .rope_keys import read_rope

LAYER_TYPES = ("full_attention", "sliding_attention")


def read_config(
    config: dict[str, Any], generation_config: dict[str, Any], where: str
) -> tuple[ModelConfig, list[str]]:
    """config.json (and generation_config.json, {} when absent) -> canonical config and notices.

    Raises InvalidInputError (missing key, wrong type or range) or UnsupportedModelError (a feature we lack).
    """
    reader = ConfigReader(config, where)
    rope = read_rope(reader)
    model = ModelConfig(
        **keys.base_arguments(reader, generation_config),
        **keys.gqa_arguments(reader, rope),
        **keys.softmax_router(reader.boolean("norm_topk_prob", False)),
        **_window(reader),
        attention_bias=reader.boolean("qkv_bias", True),
        moe_layers=keys.every_sparse_step(reader),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        n_routed_experts=keys.num_experts(reader),
        n_shared_experts=1,
        shared_expert_intermediate_size=reader.integer("shared_expert_intermediate_size"),
        shared_expert_gate=True,
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
    )
    return model, keys.finish(reader, "Qwen2-MoE")


def _window(reader: ConfigReader) -> dict[str, Any]:
    window = reader.optional_integer("sliding_window")
    types = reader.texts("layer_types")
    reader.optional_integer("max_window_layers")
    for name in types or ():
        if name not in LAYER_TYPES:
            reader.unsupported("layer_types", name, f"this version runs only {' or '.join(LAYER_TYPES)}")
    if types is not None and len(types) != reader.integer("num_hidden_layers"):
        reader.wrong("layer_types", "one name for each of num_hidden_layers", len(types))
    if not reader.boolean("use_sliding_window", False) or not window:
        return {}
    if types is None:
        reader.unsupported("use_sliding_window", True, "layer_types must say which layers have the window")
    layers = tuple(layer for layer, name in enumerate(types) if name == "sliding_attention")
    return {"sliding_window": window, "sliding_window_layers": layers} if layers else {}


def device_tensors(config: ModelConfig) -> list[TensorSpec]:
    """The hub calls the shared expert mlp.shared_expert."""
    return renamed(
        canonical_tensors(config), lambda name: name.replace(".mlp.shared_experts.", ".mlp.shared_expert.")
    )


FAMILY = Family(
    name="qwen2_moe",
    title="Qwen2-MoE, Qwen1.5-MoE",
    architectures=("Qwen2MoeForCausalLM",),
    model_types=("qwen2_moe",),
    read_config=read_config,
    device_tensors=device_tensors,
    expert_layouts=expert_layouts,
    experts_prefix=experts_prefix,
    left_out=left_out,
)
