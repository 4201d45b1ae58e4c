"""config.json of released models, as their repositories have it, and the parameters their authors state."""

from typing import Any

_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
_DEEPSEEK_V2 = _COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
_QWEN3 = _COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN2 = _COMMON | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_MIXTRAL = _COMMON | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "vocab_size": 32000,
}
_GLM = _COMMON | {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "topk_group": 1,
    "vocab_size": 151552,
}


def _sizes(hidden: int, dense: int, moe: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": dense,
        "moe_intermediate_size": moe,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _mixtral(hidden: int, inner: int, layers: int, heads: int, context: int) -> dict[str, Any]:
    sizes = _sizes(hidden, inner, 0, layers, heads) | {"max_position_embeddings": context}
    del sizes["moe_intermediate_size"]
    return _MIXTRAL | sizes


# Model -> config.json and parameters (in thousand millions, without multi-token-prediction layers).
RELEASED: dict[str, tuple[dict[str, Any], float]] = {
    "DeepSeek-V2-Lite": (
        _DEEPSEEK_V2
        | _sizes(2048, 10944, 1408, 27, 16)
        | {
            "n_group": 1,
            "n_routed_experts": 64,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "topk_method": "greedy",
        },
        15.7,
    ),
    "DeepSeek-V2": (
        _DEEPSEEK_V2
        | _sizes(5120, 12288, 1536, 60, 128)
        | {
            "n_group": 8,
            "n_routed_experts": 160,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "routed_scaling_factor": 16.0,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
        },
        235.7,
    ),
    "Qwen3-30B-A3B": (_QWEN3 | _sizes(2048, 6144, 768, 48, 32) | {"max_window_layers": 48}, 30.5),
    "Qwen3-235B-A22B": (_QWEN3 | _sizes(4096, 12288, 1536, 94, 64) | {"max_window_layers": 94}, 235.1),
    "Qwen1.5-MoE-A2.7B": (
        _QWEN2
        | _sizes(2048, 5632, 1408, 24, 16)
        | {
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_key_value_heads": 16,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768,
        },
        14.3,
    ),
    "Qwen2-57B-A14B": (
        _QWEN2
        | _sizes(3584, 18944, 2560, 28, 28)
        | {
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_key_value_heads": 4,
            "shared_expert_intermediate_size": 20480,
            "sliding_window": 65536,
        },
        57.4,
    ),
    "Mixtral-8x7B": (_mixtral(4096, 14336, 32, 32, 32768), 46.7),
    "Mixtral-8x22B": (_mixtral(6144, 16384, 56, 48, 65536), 140.6),
    "GLM-4.5": (
        _GLM
        | _sizes(5120, 12288, 1536, 92, 96)
        | {
            "first_k_dense_replace": 3,
            "n_routed_experts": 160,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
        },
        355.0,
    ),
    "GLM-4.5-Air": (
        _GLM
        | _sizes(4096, 10944, 1408, 46, 96)
        | {
            "first_k_dense_replace": 1,
            "n_routed_experts": 128,
            "routed_scaling_factor": 1.0,
            "use_qk_norm": False,
        },
        106.0,
    ),
}
