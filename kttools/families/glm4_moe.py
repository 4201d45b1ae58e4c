"""GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7: grouped-query attention, DeepSeek-V3's router.

Half of each head is rotated (partial_rotary_factor), q, k and v have biases where attention_bias says so (o
never), queries and keys a norm per head where use_qk_norm does. Multi-token-prediction modules are left out.
"""

from typing import Any

from kttools_runtime.config import ModelConfig

from . import config_keys as keys
from .base import Family
from .canonical import canonical_tensors
from .config_reader import REQUIRED, ConfigReader
from .layouts import expert_layouts, experts_prefix, left_out
from .rope_keys import read_rope

RMS_NORM_EPS = 1e-5
PARTIAL_ROTARY_FACTOR = 0.5


def read_config(
    config: dict[str, Any], generation_config: dict[str, Any], where: str
) -> tuple[ModelConfig, list[str]]:
    """config.json (and generation_config.json, {} when absent) -> canonical config and notices.

    Raises InvalidInputError (missing key, wrong type or range) or UnsupportedModelError (a feature we lack).
    """
    reader = ConfigReader(config, where)
    reader.only("scoring_func", "sigmoid", ("sigmoid",))
    rope = read_rope(reader, partial_rotary_factor=PARTIAL_ROTARY_FACTOR)
    model = ModelConfig(
        **keys.base_arguments(reader, generation_config, RMS_NORM_EPS),
        **keys.gqa_arguments(reader, rope),
        attention_bias=reader.boolean("attention_bias", False),
        qk_norm=reader.boolean("use_qk_norm", False),
        moe_layers=keys.dense_then_moe(reader),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        router="sigmoid_bias_groups",
        n_routed_experts=reader.integer("n_routed_experts"),
        n_shared_experts=reader.optional_integer("n_shared_experts", REQUIRED) or 0,
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        n_group=reader.integer("n_group", 1),
        topk_group=reader.integer("topk_group", 1),
        norm_topk_prob=reader.boolean("norm_topk_prob", True),
        routed_scaling_factor=reader.number("routed_scaling_factor"),
    )
    return model, keys.finish(reader, "GLM-4.5")


FAMILY = Family(
    name="glm4_moe",
    title="GLM-4.5, 4.5-Air, 4.6, 4.7",
    architectures=("Glm4MoeForCausalLM",),
    model_types=("glm4_moe",),
    read_config=read_config,
    device_tensors=canonical_tensors,
    expert_layouts=expert_layouts,
    experts_prefix=experts_prefix,
    left_out=left_out,
)
