"""The tensors of a bundle, by kind: names, roles and shapes. Most are those of DeepSeek-V3 on the hub.

A family whose checkpoints call them otherwise says so with `renamed`.
"""

from collections.abc import Callable
from dataclasses import replace

from kttools_runtime.config import ModelConfig

from .base import Role, TensorSpec


def canonical_tensors(config: ModelConfig) -> list[TensorSpec]:
    """Every non-expert tensor of a bundle with this config, in layer order."""
    hidden = config.hidden_size
    specs = [TensorSpec("model.embed_tokens.weight", Role.EMBEDDING, (config.vocab_size, hidden))]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        specs.append(TensorSpec(prefix + "input_layernorm.weight", Role.NORM, (hidden,)))
        specs += _ATTENTION[config.attention](config, prefix + "self_attn.")
        specs.append(TensorSpec(prefix + "post_attention_layernorm.weight", Role.NORM, (hidden,)))
        specs += _moe(config, prefix + "mlp.") if config.is_moe(layer) else _dense(config, prefix + "mlp.")
    specs.append(TensorSpec("model.norm.weight", Role.NORM, (hidden,)))
    if not config.tie_word_embeddings:
        specs.append(TensorSpec("lm_head.weight", Role.HEAD, (config.vocab_size, hidden)))
    return specs


def renamed(specs: list[TensorSpec], *sources: Callable[[str], str]) -> list[TensorSpec]:
    """The same tensors, found in checkpoints under sources[0](name), else sources[1](name), ..."""
    return [replace(spec, source_names=tuple(dict.fromkeys(s(spec.name) for s in sources))) for spec in specs]


def _mla(config: ModelConfig, prefix: str) -> list[TensorSpec]:
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
    return _attention_specs(prefix, linears, biases, norms)


def _gqa(config: ModelConfig, prefix: str) -> list[TensorSpec]:
    hidden, dim = config.hidden_size, config.qk_head_dim
    query, key = config.num_attention_heads * dim, config.num_key_value_heads * dim
    linears = {
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
    }
    biases = {"q_proj": query, "k_proj": key, "v_proj": key} if config.attention_bias else {}
    biases |= {"o_proj": hidden} if config.attention_output_bias else {}
    norms = {"q_norm": dim, "k_norm": dim} if config.qk_norm else {}
    specs = _attention_specs(prefix, linears, biases, norms)
    if config.attention_sinks:
        specs.append(TensorSpec(f"{prefix}sinks", Role.ATTENTION_BIAS, (config.num_attention_heads,)))
    return specs


_ATTENTION = {"mla": _mla, "gqa": _gqa}


def _attention_specs(
    prefix: str, linears: dict[str, tuple[int, int]], biases: dict[str, int], norms: dict[str, int]
) -> list[TensorSpec]:
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
    hidden, experts = config.hidden_size, config.n_routed_experts
    specs = [TensorSpec(prefix + "gate.weight", Role.ROUTER, (experts, hidden))]
    if config.router_bias:
        specs.append(TensorSpec(prefix + "gate.bias", Role.ROUTER_BIAS, (experts,)))
    if config.expert_bias:
        inner = config.moe_intermediate_size
        widths = {"gate_proj": inner, "up_proj": inner, "down_proj": hidden}
        specs += [
            TensorSpec(f"{prefix}experts.{name}_bias", Role.EXPERT_BIAS, (experts, width))
            for name, width in widths.items()
        ]
    if config.router == "sigmoid_bias_groups":
        specs.append(TensorSpec(prefix + "gate.e_score_correction_bias", Role.ROUTER_BIAS, (experts,)))
    if config.n_shared_experts:
        shared = config.shared_intermediate_size
        specs += _gated_mlp(prefix + "shared_experts.", Role.SHARED_EXPERT, hidden, shared)
    if config.shared_expert_gate:
        specs.append(TensorSpec(prefix + "shared_expert_gate.weight", Role.ROUTER, (1, hidden)))
    return specs
