"""DeepSeek-V3 and every config of its architecture: V3, R1, V3.1, Kimi-K2, Moonlight.

Keys and defaults are those of transformers' DeepseekV3Config and of the models' own config.json files.
Multi-token-prediction modules are left out: generation does not need them.
"""

from typing import Any

from kttools_runtime.config import ModelConfig

from . import config_keys as keys
from .base import Family
from .canonical import canonical_tensors
from .config_reader import REQUIRED, ConfigReader
from .layouts import expert_layouts, experts_prefix, left_out
from .rope_keys import read_rope


def read_config(
    config: dict[str, Any], generation_config: dict[str, Any], where: str
) -> tuple[ModelConfig, list[str]]:
    """config.json (and generation_config.json, {} when absent) -> canonical config and notices.

    Raises InvalidInputError (missing key, wrong type or range) or UnsupportedModelError (a feature we lack).
    """
    reader = ConfigReader(config, where)
    reader.only("scoring_func", "sigmoid", ("sigmoid",))
    reader.only("topk_method", "noaux_tc", ("noaux_tc",))
    rope = read_rope(reader, kinds=("default", "yarn"))
    base = keys.base_arguments(reader, generation_config)
    model = ModelConfig(
        **base,
        **keys.mla_arguments(reader, rope),
        latent_norm_eps=keys.latent_norm_eps(base["rms_norm_eps"]),
        rope_interleave=reader.boolean("rope_interleave", True),
        moe_layers=keys.dense_then_moe(reader),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        router="sigmoid_bias_groups",
        n_routed_experts=reader.integer("n_routed_experts"),
        n_shared_experts=reader.optional_integer("n_shared_experts", REQUIRED) or 0,
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        n_group=reader.integer("n_group"),
        topk_group=reader.integer("topk_group"),
        norm_topk_prob=reader.boolean("norm_topk_prob", True),
        routed_scaling_factor=reader.number("routed_scaling_factor"),
    )
    keys.check_derived_heads(reader, model)
    return model, keys.finish(reader, "DeepSeek-V3")


FAMILY = Family(
    name="deepseek_v3",
    title="DeepSeek-V3, R1, V3.1, Kimi-K2",
    architectures=("DeepseekV3ForCausalLM",),
    model_types=("deepseek_v3", "kimi_k2"),
    read_config=read_config,
    device_tensors=canonical_tensors,
    expert_layouts=expert_layouts,
    experts_prefix=experts_prefix,
    left_out=left_out,
)
