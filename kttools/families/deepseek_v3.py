"""DeepSeek-V3 and every config of its architecture: V3, R1, V3.1, Kimi-K2.

Keys and defaults are those of transformers' DeepseekV3Config and of the models' own config.json files. Sizes
are required: a default would silently make another model of it. Layers at and after num_hidden_layers that
hold an eh_proj are multi-token-prediction (MTP) modules; generation does not need them and they are left out.
"""

import re
from typing import Any

from kttools_runtime.config import ModelConfig, YarnScaling

from .base import ExpertLayout, ExpertPart, Family, Role, TensorSpec
from .config_reader import REQUIRED, ConfigReader

# Keys that only matter for training, loading or another engine; everything else unknown is named in a notice.
# fmt: off
IGNORED_KEYS = frozenset(
    {
        "architectures", "model_type", "auto_map", "torch_dtype", "dtype", "transformers_version",
        "_name_or_path", "_attn_implementation", "attention_dropout", "initializer_range", "use_cache",
        "pretraining_tp", "ep_size", "aux_loss_alpha", "seq_aux", "output_router_logits",
        "router_aux_loss_coef", "pad_token_id", "unk_token_id", "num_mtp_layers", "tokenizer_class",
        "id2label", "label2id", "output_attentions", "output_hidden_states", "return_dict",
        "is_encoder_decoder", "chunk_size_feed_forward", "problem_type",
    }
)
# fmt: on

# Keys of related architectures that change results: a value other than the neutral ones is refused.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "layer_types": (None,),
    "index_topk": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
    "qk_norm": (None, False),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "no_rope_layers": (None,),
    "swiglu_limit": (None,),
    "zero_expert_num": (None, 0),
    "hc_mult": (None, 1),
}

ROPE_KEYS = frozenset({"type", "rope_type", "rope_theta"})
YARN_KEYS = ROPE_KEYS | {
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
}


def read_config(
    config: dict[str, Any], generation_config: dict[str, Any], where: str
) -> tuple[ModelConfig, list[str]]:
    """config.json (and generation_config.json, {} when absent) -> canonical config and notices.

    Raises InvalidInputError (missing key, wrong type or range) or UnsupportedModelError (a feature we lack).
    """
    reader = ConfigReader(config, where)
    _refuse_what_we_lack(reader)
    rope_theta, rope_scaling = _rope(reader)
    model = ModelConfig(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        intermediate_size=reader.integer("intermediate_size"),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers"),
        moe_layers=_moe_layers(reader),
        hidden_act=reader.only("hidden_act", "silu", ("silu",)),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        bos_token_id=reader.optional_integer("bos_token_id"),
        eos_token_ids=_eos_token_ids(reader, generation_config),
        attention="mla",
        num_attention_heads=reader.integer("num_attention_heads"),
        num_key_value_heads=_num_key_value_heads(reader),
        q_lora_rank=reader.optional_integer("q_lora_rank", REQUIRED),
        kv_lora_rank=reader.integer("kv_lora_rank"),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim"),
        qk_rope_head_dim=reader.integer("qk_rope_head_dim"),
        v_head_dim=reader.integer("v_head_dim"),
        attention_bias=reader.boolean("attention_bias", False),
        rope_theta=rope_theta,
        rope_interleave=reader.boolean("rope_interleave", True),
        rope_scaling=rope_scaling,
        router="sigmoid_bias_groups",
        n_routed_experts=reader.integer("n_routed_experts"),
        n_shared_experts=reader.optional_integer("n_shared_experts", REQUIRED) or 0,
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        n_group=reader.integer("n_group"),
        topk_group=reader.integer("topk_group"),
        norm_topk_prob=reader.boolean("norm_topk_prob", True),
        routed_scaling_factor=reader.number("routed_scaling_factor"),
    )
    _check_derived(reader, model)
    return model, _notices(reader, model)


def _refuse_what_we_lack(reader: ConfigReader) -> None:
    reader.only("scoring_func", "sigmoid", ("sigmoid",))
    reader.only("topk_method", "noaux_tc", ("noaux_tc",))
    for key, neutral in NEUTRAL_VALUES.items():
        reader.used.add(key)
        value = reader.values.get(key)
        if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral):
            reader.unsupported(key, value, "it changes results and DeepSeek-V3 has no such key")


def _moe_layers(reader: ConfigReader) -> tuple[int, ...]:
    """Layer L is MoE when L >= first_k_dense_replace and L % moe_layer_freq == 0 (DeepSeek's own code)."""
    num_layers = reader.integer("num_hidden_layers")
    first, frequency = reader.integer("first_k_dense_replace"), reader.integer("moe_layer_freq", 1)
    if first < 0:
        reader.wrong("first_k_dense_replace", "at least 0", first)
    if frequency < 1:
        reader.wrong("moe_layer_freq", "at least 1", frequency)
    # A layer count out of range is refused by ModelConfig; here it only must not exhaust memory.
    return tuple(layer for layer in range(first, min(num_layers, 10**6)) if layer % frequency == 0)


def _num_key_value_heads(reader: ConfigReader) -> int:
    heads = reader.optional_integer("num_key_value_heads")
    return reader.integer("num_attention_heads") if heads is None else heads


def _eos_token_ids(reader: ConfigReader, generation_config: dict[str, Any]) -> tuple[int, ...]:
    """The config's stop tokens, then those generation_config.json adds."""
    found: list[int] = []
    generation = ConfigReader(generation_config, "generation_config.json")
    for source in (reader, generation):
        source.used.add("eos_token_id")
        value = source.values.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int for item in ids):
            source.wrong("eos_token_id", "an integer, a list of integers or null", value)
        found += [item for item in ids if item not in found]
    return tuple(dict.fromkeys(found))


def _rope(reader: ConfigReader) -> tuple[float, YarnScaling | None]:
    """rope_theta and YaRN, from rope_scaling + rope_theta or from transformers 5's rope_parameters."""
    rope = _merged(reader, "rope_parameters", "rope_scaling")
    theta = rope.number("rope_theta", reader.number("rope_theta", 10000.0))
    kinds = sorted({rope.text(key) for key in ("type", "rope_type") if key in rope.values})
    if len(kinds) > 1:
        rope.wrong("rope_type", f"the same as type {rope.values['type']!r}", rope.values["rope_type"])
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", "yarn"):
        rope.unsupported("rope_type", kind, "this version runs only default or yarn")
    for key, value in rope.values.items():
        if value is not None and key not in (YARN_KEYS if kind == "yarn" else ROPE_KEYS):
            rope.unsupported(key, value, f"not a key of {kind} rope")
    return theta, _yarn(rope, reader.integer("max_position_embeddings")) if kind == "yarn" else None


def _merged(reader: ConfigReader, *keys: str) -> ConfigReader:
    """The objects under `keys` as one; they may repeat each other and must not disagree."""
    values: dict[str, Any] = {}
    for key in keys:
        part = reader.child(key)
        for name, value in part.values.items() if part else ():
            if values.setdefault(name, value) != value:
                reader.wrong(f"{key}.{name}", f"{values[name]!r} as in {keys[0]}", value)
    present = next((key for key in reversed(keys) if reader.values.get(key)), keys[0])
    return ConfigReader(values, reader.where, f"{present}.")


def _yarn(rope: ConfigReader, max_position_embeddings: int) -> YarnScaling:
    """Defaults are transformers': beta_fast 32, beta_slow 1, also for 0 and null."""
    return YarnScaling(
        factor=rope.number("factor"),
        original_max_position_embeddings=rope.integer(
            "original_max_position_embeddings", max_position_embeddings
        ),
        beta_fast=rope.optional_number("beta_fast") or 32.0,
        beta_slow=rope.optional_number("beta_slow") or 1.0,
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        attention_factor=rope.optional_number("attention_factor"),
        truncate=rope.boolean("truncate", True),
    )


def _check_derived(reader: ConfigReader, model: ModelConfig) -> None:
    """Keys newer transformers write that follow from others; a different value would mean another model."""
    derived = {"head_dim": model.qk_rope_head_dim, "qk_head_dim": model.qk_head_dim}
    for key, expected in derived.items():
        value = reader.optional_integer(key)
        if value is not None and value != expected:
            reader.unsupported(key, value, f"it follows from the other sizes as {expected}")


def _notices(reader: ConfigReader, model: ModelConfig) -> list[str]:
    notices = []
    mtp = reader.optional_integer("num_nextn_predict_layers")
    if mtp:
        notices.append(f"num_nextn_predict_layers {mtp}: multi-token-prediction layers are left out")
    unknown = [key for key in reader.unused() if key not in IGNORED_KEYS]
    if unknown:
        notices.append(f"config.json keys not used: {', '.join(unknown)}")
    return notices


def device_tensors(config: ModelConfig) -> list[TensorSpec]:
    """Every non-expert tensor in layer order; names are the hub's and canonical at once."""
    hidden = config.hidden_size
    specs = [TensorSpec("model.embed_tokens.weight", Role.EMBEDDING, (config.vocab_size, hidden))]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        specs.append(TensorSpec(prefix + "input_layernorm.weight", Role.NORM, (hidden,)))
        specs += _attention(config, prefix + "self_attn.")
        specs.append(TensorSpec(prefix + "post_attention_layernorm.weight", Role.NORM, (hidden,)))
        specs += _moe(config, prefix + "mlp.") if config.is_moe(layer) else _dense(config, prefix + "mlp.")
    specs.append(TensorSpec("model.norm.weight", Role.NORM, (hidden,)))
    if not config.tie_word_embeddings:
        specs.append(TensorSpec("lm_head.weight", Role.HEAD, (config.vocab_size, hidden)))
    return specs


def _attention(config: ModelConfig, prefix: str) -> list[TensorSpec]:
    hidden, heads, q_rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    kv_a_rows = config.kv_lora_rank + config.qk_rope_head_dim
    linears = {
        "kv_a_proj_with_mqa": (kv_a_rows, hidden),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "o_proj": (hidden, heads * config.v_head_dim),
    }
    norms = {"kv_a_layernorm": config.kv_lora_rank}
    biases = {"kv_a_proj_with_mqa": kv_a_rows, "o_proj": hidden} if config.attention_bias else {}
    if q_rank is None:
        linears["q_proj"] = (heads * config.qk_head_dim, hidden)
    else:
        linears |= {"q_a_proj": (q_rank, hidden), "q_b_proj": (heads * config.qk_head_dim, q_rank)}
        norms["q_a_layernorm"] = q_rank
        biases |= {"q_a_proj": q_rank} if config.attention_bias else {}
    return [
        *(
            TensorSpec(f"{prefix}{name}.weight", Role.ATTENTION, shape)
            for name, shape in sorted(linears.items())
        ),
        *(
            TensorSpec(f"{prefix}{name}.bias", Role.ATTENTION_BIAS, (n,))
            for name, n in sorted(biases.items())
        ),
        *(TensorSpec(f"{prefix}{name}.weight", Role.NORM, (n,)) for name, n in sorted(norms.items())),
    ]


def _gated_mlp(prefix: str, role: Role, hidden: int, intermediate: int) -> list[TensorSpec]:
    return [
        TensorSpec(prefix + "gate_proj.weight", role, (intermediate, hidden)),
        TensorSpec(prefix + "up_proj.weight", role, (intermediate, hidden)),
        TensorSpec(prefix + "down_proj.weight", role, (hidden, intermediate)),
    ]


def _dense(config: ModelConfig, prefix: str) -> list[TensorSpec]:
    return _gated_mlp(prefix, Role.DENSE_MLP, config.hidden_size, config.intermediate_size)


def _moe(config: ModelConfig, prefix: str) -> list[TensorSpec]:
    specs = [
        TensorSpec(prefix + "gate.weight", Role.ROUTER, (config.n_routed_experts, config.hidden_size)),
        TensorSpec(prefix + "gate.e_score_correction_bias", Role.ROUTER_BIAS, (config.n_routed_experts,)),
    ]
    if config.n_shared_experts:
        shared = config.shared_intermediate_size
        specs += _gated_mlp(prefix + "shared_experts.", Role.SHARED_EXPERT, config.hidden_size, shared)
    return specs


def experts_prefix(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts."


def expert_layouts(config: ModelConfig) -> list[ExpertLayout]:
    """The hub's one tensor per expert, and what transformers 5 saves: stacked, gate and up fused or not."""
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    wide, tall = (inner, hidden), (hidden, inner)
    layouts = [
        ExpertLayout(
            "one tensor per expert",
            ExpertPart("{expert}.gate_proj.weight", wide),
            ExpertPart("{expert}.up_proj.weight", wide),
            ExpertPart("{expert}.down_proj.weight", tall),
        )
    ]
    for suffix in ("", ".weight"):
        down = ExpertPart("down_proj" + suffix, (experts, *tall))
        fused = (experts, 2 * inner, hidden)
        gate_up = ExpertPart("gate_up_proj" + suffix, fused)
        layouts.append(ExpertLayout("gate and up fused, experts stacked", gate_up, gate_up, down))
        gate, up = (ExpertPart(name + suffix, (experts, *wide)) for name in ("gate_proj", "up_proj"))
        layouts.append(ExpertLayout("experts stacked", gate, up, down))
    return layouts


def left_out(name: str, config: ModelConfig, names: frozenset[str]) -> str | None:
    """The reason a tensor beyond the table may be ignored; None when it should not be there."""
    if name.endswith("rotary_emb.inv_freq"):
        return "rope frequencies, computed from config.json"
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "lm_head.weight, tied to the embedding by config.json"
    if not config.n_shared_experts and ".mlp.shared_experts." in name:
        return "shared expert tensors, n_shared_experts is 0"
    layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers and f"{layer[0]}eh_proj.weight" in names:
        return f"multi-token-prediction layer {int(layer[1])}"
    return None


FAMILY = Family(
    name="deepseek_v3",
    title="DeepSeek-V3, R1, V3.1, Kimi-K2",
    architectures=("DeepseekV3ForCausalLM",),
    model_types=("deepseek_v3", "kimi_k2"),
    read_config=read_config,
    device_tensors=device_tensors,
    expert_layouts=expert_layouts,
    experts_prefix=experts_prefix,
    left_out=left_out,
)
