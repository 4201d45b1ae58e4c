"""What families read alike from config.json: sizes, tokens, layers, attention, keys that must not be ignored.

Keys and defaults are those of transformers' config classes. Sizes are required: a default would silently make
another model of it.
"""

from typing import Any

from kttools_runtime.config import ModelConfig
from kttools_runtime.config_checks import MAX_DIMENSION

from .config_reader import REQUIRED, ConfigReader
from .rope_keys import Rope

# Keys that only matter for training, loading or another engine; everything else unknown is named in a notice.
# fmt: off
IGNORED_KEYS = frozenset(
    {
        "architectures", "model_type", "auto_map", "torch_dtype", "dtype", "transformers_version",
        "_name_or_path", "_attn_implementation", "attention_dropout", "initializer_range", "use_cache",
        "pretraining_tp", "ep_size", "aux_loss_alpha", "seq_aux", "output_router_logits",
        "router_aux_loss_coef", "router_jitter_noise", "pad_token_id", "unk_token_id", "num_mtp_layers",
        "tokenizer_class", "id2label", "label2id", "output_attentions", "output_hidden_states", "return_dict",
        "is_encoder_decoder", "chunk_size_feed_forward", "problem_type",
    }
)
# fmt: on

# Keys of some architectures that change results. A family that does not read one refuses any value of it but
# the neutral ones.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "layer_types": (None,),
    "index_topk": (None,),
    "dual_chunk_attention_config": (None,),
    "sparse_attention_config": (None,),
    "original_max_position_embeddings": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "clip_qkv": (None,),
    "attention_bias": (None, False),
    "qkv_bias": (None, False),
    "use_qk_norm": (None, False),
    "qk_norm": (None, False),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "no_rope_layers": (None,),
    "swiglu_limit": (None,),
    "zero_expert_num": (None, 0),
    "hc_mult": (None, 1),
}
# Layer lists longer than this are refused later by ModelConfig; here they only must not exhaust memory.
MAX_LISTED_LAYERS = 10**6


def base_arguments(
    reader: ConfigReader, generation_config: dict[str, Any], rms_norm_eps: float = 1e-6
) -> dict[str, Any]:
    """Arguments of ModelConfig that every family has; rms_norm_eps: the family's documented default."""
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": reader.integer("hidden_size"),
        "intermediate_size": reader.integer("intermediate_size"),
        "num_hidden_layers": reader.integer("num_hidden_layers"),
        "hidden_act": reader.only("hidden_act", "silu", ("silu",)),
        "rms_norm_eps": reader.number("rms_norm_eps", rms_norm_eps),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "bos_token_id": reader.optional_integer("bos_token_id"),
        "eos_token_ids": _eos_token_ids(reader, generation_config),
        "num_attention_heads": reader.integer("num_attention_heads"),
        "num_key_value_heads": _num_key_value_heads(reader),
    }


def gqa_arguments(reader: ConfigReader, rope: Rope) -> dict[str, Any]:
    """Attention gqa with rotary pairs (x_i, x_{i + d/2}); head_dim by default hidden_size / heads."""
    head_dim = reader.optional_integer("head_dim")
    if head_dim is None:
        hidden_size, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
        if heads < 1 or hidden_size % heads:
            reader.wrong("num_attention_heads", f"a divisor of hidden_size {hidden_size}", heads)
        head_dim = hidden_size // heads
    if not 1 <= head_dim <= MAX_DIMENSION:
        reader.wrong("head_dim", f"an integer in 1..{MAX_DIMENSION}", head_dim)
    rotary_dim = int(head_dim * rope.partial_rotary_factor)
    return {
        "attention": "gqa",
        "q_lora_rank": None,
        "kv_lora_rank": 0,
        "qk_nope_head_dim": head_dim - rotary_dim,
        "qk_rope_head_dim": rotary_dim,
        "v_head_dim": head_dim,
        "rope_theta": rope.theta,
        "rope_interleave": False,
        "rope_scaling": rope.scaling,
    }


def mla_arguments(reader: ConfigReader, rope: Rope) -> dict[str, Any]:
    """Attention mla, but for rope_interleave."""
    return {
        "attention": "mla",
        "q_lora_rank": reader.optional_integer("q_lora_rank", REQUIRED),
        "kv_lora_rank": reader.integer("kv_lora_rank"),
        "qk_nope_head_dim": reader.integer("qk_nope_head_dim"),
        "qk_rope_head_dim": reader.integer("qk_rope_head_dim"),
        "v_head_dim": reader.integer("v_head_dim"),
        "attention_bias": reader.boolean("attention_bias", False),
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
    }


def latent_norm_eps(rms_norm_eps: float) -> float | None:
    """DeepSeek's own code and transformers' norm the latents with 1e-6, whatever rms_norm_eps is."""
    return None if rms_norm_eps == 1e-6 else 1e-6


def softmax_router(norm_topk_prob: bool) -> dict[str, Any]:
    """Softmax over all experts, the best of them, no groups and no scale."""
    return {
        "router": "softmax_groups",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": norm_topk_prob,
        "routed_scaling_factor": 1.0,
    }


def every_layer(reader: ConfigReader) -> tuple[int, ...]:
    return tuple(range(min(reader.integer("num_hidden_layers"), MAX_LISTED_LAYERS)))


def window_everywhere(reader: ConfigReader, window: int) -> dict[str, Any]:
    """A sliding window in all layers."""
    return {"sliding_window": window, "sliding_window_layers": every_layer(reader)}


def dense_then_moe(reader: ConfigReader) -> tuple[int, ...]:
    """Layer L is MoE when L >= first_k_dense_replace and L % moe_layer_freq == 0 (DeepSeek's own code)."""
    num_layers = reader.integer("num_hidden_layers")
    first, frequency = reader.integer("first_k_dense_replace"), reader.integer("moe_layer_freq", 1)
    if first < 0:
        reader.wrong("first_k_dense_replace", "at least 0", first)
    if frequency < 1:
        reader.wrong("moe_layer_freq", "at least 1", frequency)
    layers = range(first, min(num_layers, MAX_LISTED_LAYERS))
    return tuple(layer for layer in layers if layer % frequency == 0)


def every_sparse_step(reader: ConfigReader) -> tuple[int, ...]:
    """Layer L is MoE when (L + 1) % decoder_sparse_step == 0 and mlp_only_layers does not list it (Qwen)."""
    step = reader.integer("decoder_sparse_step", 1)
    if step < 1:
        reader.wrong("decoder_sparse_step", "at least 1", step)
    dense = set(reader.integers("mlp_only_layers"))
    return tuple(layer for layer in every_layer(reader) if (layer + 1) % step == 0 and layer not in dense)


def num_experts(reader: ConfigReader) -> int:
    """num_experts, which transformers 5 also writes as num_local_experts; both must agree."""
    found = [key for key in ("num_experts", "num_local_experts") if key in reader.values] or ["num_experts"]
    values = [reader.integer(key) for key in found]
    if len(set(values)) > 1:
        reader.wrong(found[1], f"{values[0]} as {found[0]}", values[1])
    return values[0]


def finish(reader: ConfigReader, title: str) -> list[str]:
    """After all keys are read: refuses keys that change results and were not read; notices for the rest."""
    for key, neutral in NEUTRAL_VALUES.items():
        if key in reader.used:
            continue
        reader.used.add(key)
        value = reader.values.get(key)
        if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral):
            reader.unsupported(key, value, f"it changes results and {title} has no such key")
    notices = []
    mtp = reader.optional_integer("num_nextn_predict_layers")
    if mtp:
        notices.append(f"num_nextn_predict_layers {mtp}: multi-token-prediction layers are left out")
    unknown = [key for key in reader.unused() if key not in IGNORED_KEYS]
    if unknown:
        notices.append(f"config.json keys not used: {', '.join(unknown)}")
    return notices


def check_derived_heads(reader: ConfigReader, model: ModelConfig) -> None:
    """Keys newer transformers write for mla that follow from others; another value means another model."""
    derived = {"head_dim": model.qk_rope_head_dim, "qk_head_dim": model.qk_head_dim}
    for key, expected in derived.items():
        value = reader.optional_integer(key)
        if value is not None and value != expected:
            reader.unsupported(key, value, f"it follows from the other sizes as {expected}")


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
