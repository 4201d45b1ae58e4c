"""Every family's transformers model as the oracle, and the way a user takes: saved, quantised, loaded.

Weights are random and exact in bfloat16 (see tests/oracle.py): a bf16 bundle holds the oracle's own numbers.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import kttools_runtime as kt
from kttools.families import open_model
from kttools.quantize.plan import make_plan
from kttools.quantize.recipe import make_recipe
from kttools.quantize.writer import Quantizer
from kttools_runtime.model import Model
from tests.oracle import randomise

COMMON: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 112,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DEEPSEEK_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32.0, "beta_slow": 1.0}

# Family -> transformers' class prefix and what its configs have beyond COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": (
        "DeepseekV2",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 16,
            "n_shared_experts": 2,
            "q_lora_rank": None,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "rope_parameters": DEFAULT_ROPE,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 16, "head_dim": 24, "norm_topk_prob": True, "rope_parameters": DEFAULT_ROPE},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 15, "shared_expert_intermediate_size": 72, "rope_parameters": DEFAULT_ROPE},
    ),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_parameters": DEFAULT_ROPE},
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            "n_routed_experts": 16,
            "head_dim": 24,
            "attention_bias": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.5},
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 8,
            "head_dim": 24,
            "num_experts_per_tok": 3,
            "sliding_window": 19,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}
GROUPS: dict[str, Any] = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
ODD: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 72,
    "intermediate_size": 88,
    "moe_intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}

# Everything that varies between models of a family, and what its code allows.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "deepseek_v2": {
        "lite": {},
        "groups": GROUPS | {"q_lora_rank": 40, "routed_scaling_factor": 16.0},
        "groups_of_one": GROUPS | {"n_group": 16, "topk_group": 5, "routed_scaling_factor": 3.0},
        "yarn": {"rope_parameters": DEEPSEEK_YARN, "q_lora_rank": 24},
        "bias_eps": {"attention_bias": True, "rms_norm_eps": 1e-3, "q_lora_rank": 24},
        "all_moe_tied": {"first_k_dense_replace": 0, "tie_word_embeddings": True, "n_shared_experts": 1},
        "odd": ODD | {"num_key_value_heads": 6, "n_routed_experts": 7, "kv_lora_rank": 34, "v_head_dim": 11},
    },
    "qwen3_moe": {
        "base": {},
        "not_normalised": {"norm_topk_prob": False, "num_key_value_heads": 4},
        "one_key_head": {"num_key_value_heads": 1, "head_dim": 6},
        "bias": {"attention_bias": True, "tie_word_embeddings": True},
        "dense_layers": {"mlp_only_layers": [0, 2]},
        "every_second": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
        "yarn": {"rope_parameters": YARN},
        "yarn_mscales": {"rope_parameters": DEEPSEEK_YARN | {"mscale": 1.3}},
        "window": {"use_sliding_window": True, "sliding_window": 19},
        "odd": ODD | {"num_experts": 7, "head_dim": 10, "rms_norm_eps": 1e-3},
    },
    "qwen2_moe": {
        "base": {},
        "normalised": {"norm_topk_prob": True, "num_key_value_heads": 4},
        "no_bias": {"qkv_bias": False, "tie_word_embeddings": True},
        "dense_layers": {"mlp_only_layers": [1], "shared_expert_intermediate_size": 33},
        "every_second": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
        "window": {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 3},
        "llama3": {"rope_parameters": LLAMA3},
        "odd": ODD | {"num_experts": 5, "shared_expert_intermediate_size": 17},
    },
    "mixtral": {
        "base": {},
        "head_dim": {"head_dim": 22, "tie_word_embeddings": True},
        "window": {"sliding_window": 21},
        "linear": {"rope_parameters": LINEAR, "num_experts_per_tok": 1},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "num_experts_per_tok": 8},
        "odd": ODD | {"num_local_experts": 3, "num_key_value_heads": 6},
    },
    "glm4_moe": {
        "air": {},
        "qk_norm": {"use_qk_norm": True, "first_k_dense_replace": 2},
        "groups": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        "quarter": {"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.25}, "use_qk_norm": True},
        "whole": {"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 1.0}},
        "yarn": {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
        "no_bias_all_moe": {"attention_bias": False, "first_k_dense_replace": 0, "n_shared_experts": 2},
        "odd": ODD | {"n_routed_experts": 6, "head_dim": 12, "use_qk_norm": True},
    },
    "gpt_oss": {
        "base": {},
        "no_attention_bias": {"attention_bias": False, "tie_word_embeddings": True},
        "all_windows": {"layer_types": ["sliding_attention"] * 3, "sliding_window": 7},
        "no_window": {"layer_types": ["full_attention"] * 3, "num_key_value_heads": 1},
        "gate": {"swiglu_alpha": 0.7, "swiglu_limit": 0.75},
        "default_rope": {"rope_parameters": DEFAULT_ROPE, "num_experts_per_tok": 1},
        "odd": ODD | {"num_local_experts": 5, "head_dim": 10, "rms_norm_eps": 1e-3},
    },
}
ALL_CASES = [(family, case) for family, cases in CASES.items() for case in cases]
FIRST_CASES = [(family, next(iter(cases))) for family, cases in CASES.items()]


def hf_model(family: str, case: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of the family in float32 with bf16-exact weights; skips without transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers (dev dependency) is the oracle")
    prefix, own = FAMILIES[family]
    values = COMMON | own | CASES[family][case] | changes
    if family in ("mixtral", "gpt_oss"):
        values.pop("moe_intermediate_size")
    config = getattr(transformers, f"{prefix}Config")(**values)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval().to(torch.float32)
    randomise(model, seed)
    return model


def save(hf: Any, directory: Path, is_hub_names: bool = True) -> Path:
    """The checkpoint in bf16: the hub's names, or those of transformers' own modules (experts stacked)."""
    # A copy: the cast rounds the rotary frequencies too.
    copy.deepcopy(hf).to(torch.bfloat16).save_pretrained(directory, save_original_format=is_hub_names)
    return directory


def quantize(checkpoint: Path, bundle: Path, cpu_format: str = "bf16", gpu_format: str = "bf16") -> Path:
    recipe = make_recipe(cpu_format, gpu_format, 32)
    Quantizer(make_plan(open_model(checkpoint), recipe), bundle).run()
    return bundle


def reference_model(hf: Any, directory: Path, is_hub_names: bool = True) -> Model:
    """The oracle's weights through checkpoint and bundle, nothing quantised, activations in float32."""
    bundle = quantize(save(hf, directory / "hf", is_hub_names), directory / "bundle")
    return kt.load(bundle, dtype="float32", threads=1)


def tokens_for(hf: Any, num_tokens: int = 130) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, hf.config.vocab_size, (num_tokens,), generator=generator)
