"""DeepSeek-V2, V2-Lite, V2.5, Coder-V2: MLA as in V3, a softmax router.

topk_method "greedy" takes the best experts of all, "group_limited_greedy" those of the topk_group groups
whose best expert is best. DeepSeek's own code normalises the weights (norm_topk_prob, with more than one
expert) or multiplies them by routed_scaling_factor, never both; transformers ignores norm_topk_prob. Every
released model has it false.
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
    reader.only("scoring_func", "softmax", ("softmax",))
    rope = read_rope(reader, kinds=("default", "yarn"))
    base = keys.base_arguments(reader, generation_config)
    model = ModelConfig(
        **base,
        **keys.mla_arguments(reader, rope),
        **_router(reader),
        latent_norm_eps=keys.latent_norm_eps(base["rms_norm_eps"]),
        rope_interleave=True,
        moe_layers=keys.dense_then_moe(reader),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        n_routed_experts=reader.integer("n_routed_experts"),
        n_shared_experts=reader.optional_integer("n_shared_experts", REQUIRED) or 0,
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
    )
    keys.check_derived_heads(reader, model)
    notices = keys.finish(reader, "DeepSeek-V2")
    if model.norm_topk_prob:
        notices.append(
            "norm_topk_prob true: weights are normalised and not scaled, as in DeepSeek's own code; "
            "transformers ignores the key"
        )
    return model, notices


def _router(reader: ConfigReader) -> dict[str, Any]:
    method = reader.only("topk_method", "greedy", ("greedy", "group_limited_greedy"))
    groups = {key: reader.optional_integer(key) for key in ("n_group", "topk_group")}
    if method == "greedy":
        groups = dict.fromkeys(groups, 1)
    for key, value in groups.items():
        if value is None:
            reader.wrong(key, f"an integer with topk_method {method}", None)
    norm_topk_prob = reader.boolean("norm_topk_prob", False) and reader.integer("num_experts_per_tok") > 1
    scale = reader.number("routed_scaling_factor")
    return {
        "router": "softmax_groups",
        **groups,
        "norm_topk_prob": norm_topk_prob,
        "routed_scaling_factor": 1.0 if norm_topk_prob else scale,
    }


FAMILY = Family(
    name="deepseek_v2",
    title="DeepSeek-V2, V2-Lite, V2.5, Coder-V2",
    architectures=("DeepseekV2ForCausalLM",),
    model_types=("deepseek_v2",),
    read_config=read_config,
    device_tensors=canonical_tensors,
    expert_layouts=expert_layouts,
    experts_prefix=experts_prefix,
    left_out=left_out,
)
