"""gpt-oss-20b and gpt-oss-120b (OpenAI), and transformers' checkpoints of that architecture.

Grouped-query attention with biases on all projections, a learned sink per head, and a sliding window in every
second layer; yarn. Every layer is MoE: a router with a bias, the softmax over its best logits; experts with
biases and a clamped SwiGLU. Experts come in MXFP4 or BF16 (gpt_oss_tensors.py).
"""

from typing import Any

from kttools.checkpoint.base import Weights
from kttools_runtime.config import ModelConfig

from . import config_keys as keys
from .base import ExpertLayout, Family, TensorSpec
from .canonical import canonical_tensors, renamed
from .config_reader import ConfigReader
from .gpt_oss_tensors import GptOssWeights
from .layouts import experts_prefix, left_out, stacked
from .rope_keys import read_rope

RMS_NORM_EPS = 1e-5
ROPE_THETA = 150000.0
HEAD_DIM = 64
SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0
LAYER_TYPES = ("sliding_attention", "full_attention")


def read_config(
    config: dict[str, Any], generation_config: dict[str, Any], where: str
) -> tuple[ModelConfig, list[str]]:
    """config.json (and generation_config.json, {} when absent) -> canonical config and notices.

    Raises InvalidInputError (missing key, wrong type or range) or UnsupportedModelError (a feature we lack).
    """
    reader = ConfigReader({"head_dim": HEAD_DIM} | config, where)
    if not any(reader.values.get(key) for key in ("rope_scaling", "rope_parameters")):
        reader.wrong("rope_scaling", "an object", None)
    rope = read_rope(reader, ROPE_THETA)
    has_bias = reader.boolean("attention_bias", True)
    # OpenAI's own names for keys of transformers that are there too.
    for key in ("experts_per_token", "initial_context_length"):
        reader.optional_integer(key)
    model = ModelConfig(
        **keys.base_arguments(reader, generation_config, RMS_NORM_EPS),
        **keys.gqa_arguments(reader, rope),
        **keys.softmax_router(norm_topk_prob=True),
        **_window(reader),
        attention_bias=has_bias,
        attention_output_bias=has_bias,
        attention_sinks=True,
        router_bias=True,
        expert_bias=True,
        swiglu_alpha=reader.number("swiglu_alpha", SWIGLU_ALPHA),
        swiglu_limit=reader.number("swiglu_limit", SWIGLU_LIMIT),
        moe_layers=keys.every_layer(reader),
        moe_intermediate_size=reader.integer("intermediate_size"),
        n_routed_experts=reader.integer("num_local_experts"),
        n_shared_experts=0,
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
    )
    return model, keys.finish(reader, "gpt-oss")


def _window(reader: ConfigReader) -> dict[str, Any]:
    """layer_types; by default the first of every two layers has the window."""
    window, types = reader.optional_integer("sliding_window", 128), reader.texts("layer_types")
    count = len(keys.every_layer(reader))
    if types is None:
        types = tuple(LAYER_TYPES[layer % 2] for layer in range(count))
    for name in types:
        if name not in LAYER_TYPES:
            reader.unsupported("layer_types", name, f"this version runs only {' or '.join(LAYER_TYPES)}")
    if len(types) != reader.integer("num_hidden_layers"):
        reader.wrong("layer_types", "one name for each of num_hidden_layers", len(types))
    layers = tuple(layer for layer, name in enumerate(types) if name == LAYER_TYPES[0])
    return {"sliding_window": window, "sliding_window_layers": layers} if layers and window else {}


def device_tensors(config: ModelConfig) -> list[TensorSpec]:
    """The hub's router is mlp.router."""
    return renamed(canonical_tensors(config), lambda name: name.replace(".mlp.gate.", ".mlp.router."))


def expert_layouts(config: ModelConfig) -> list[ExpertLayout]:
    """What GptOssWeights makes of both dialects."""
    return [layout for layout in stacked(config) if layout.gate.name == "gate_proj"]


def view(checkpoint: Weights) -> Weights:
    return GptOssWeights(checkpoint)


FAMILY = Family(
    name="gpt_oss",
    title="gpt-oss",
    architectures=("GptOssForCausalLM",),
    model_types=("gpt_oss",),
    read_config=read_config,
    device_tensors=device_tensors,
    expert_layouts=expert_layouts,
    experts_prefix=experts_prefix,
    left_out=left_out,
    view=view,
)
