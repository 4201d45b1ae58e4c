"""transformers' DeepseekV3ForCausalLM as the oracle, and its weights as a WeightSource for the runtime.

The oracle is independent code in float32. Its random weights are exact in bfloat16, so that storing them in a
checkpoint or a pack changes nothing, and scaled so that every layer matters: an error anywhere moves the
logits.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.linear import Placement
from kttools_runtime.model import Model, build_model
from kttools_runtime.moe import RoutedExperts
from kttools_runtime.weights import LinearWeights

Weights = dict[str, Tensor]

# Keys of ModelConfig that a transformers config has under the same name.
SAME_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "attention_bias",
    "rms_norm_eps",
    "rope_interleave",
    "tie_word_embeddings",
    "max_position_embeddings",
    "hidden_act",
)
YARN_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
BASE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 112,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

# Everything that varies between models of the architecture, a little of it in each.
CONFIGS: dict[str, dict[str, Any]] = {
    "base": {},
    "query_without_rank": {"q_lora_rank": None, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "one_group": {"n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    "all_moe_no_shared": {"first_k_dense_replace": 0, "n_shared_experts": 0, "n_group": 8, "topk_group": 3},
    "all_dense": {"first_k_dense_replace": 3},
    "yarn_equal_mscale": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn_two_mscales": {
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.3, "factor": 40.0},
        "rope_interleave": False,
    },
    "yarn_plain": {"rope_parameters": YARN, "qk_rope_head_dim": 16},
    "halves_rope": {"rope_interleave": False, "attention_bias": True, "topk_group": 4},
    "halves_rope_no_rank": {"rope_interleave": False, "attention_bias": True, "q_lora_rank": None},
    "tied": {"tie_word_embeddings": True, "first_k_dense_replace": 2},
    "odd_sizes": {
        "hidden_size": 320,
        "moe_intermediate_size": 96,
        "intermediate_size": 200,
        "n_routed_experts": 10,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "vocab_size": 257,
        "kv_lora_rank": 40,
        "q_lora_rank": 72,
        "v_head_dim": 20,
    },
    "odd_heads": {"qk_nope_head_dim": 17, "qk_rope_head_dim": 6, "v_head_dim": 27, "kv_lora_rank": 33},
}


def hf_model(overrides: dict[str, Any], seed: int = 0) -> Any:
    """A random DeepseekV3ForCausalLM in float32 with bf16-exact weights; skips without transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers (dev dependency) is the oracle")
    config = transformers.DeepseekV3Config(**{**BASE, **overrides})
    config._attn_implementation = "eager"
    model = transformers.DeepseekV3ForCausalLM(config).eval().to(torch.float32)
    _randomise(model, seed)
    return model


def _randomise(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            if name.endswith("inv_freq") or tensor.numel() == 0:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(_scaled(name, noise).to(torch.bfloat16))


def _scaled(name: str, noise: Tensor) -> Tensor:
    if name.endswith(("layernorm.weight", "model.norm.weight")):
        return 1.0 + 0.2 * noise
    if name.endswith("e_score_correction_bias"):
        return 0.2 * noise - (0.2 * noise).min()
    if name.endswith(".bias"):
        return 0.1 * noise
    if "embed_tokens" in name:
        return noise
    return noise / math.sqrt(noise.shape[-1])


def hf_logits(model: Any, token_ids: Tensor) -> Tensor:
    """float32 [T, vocab_size]."""
    with torch.inference_mode():
        return model(token_ids[None], use_cache=False).logits[0].to(torch.float32)


def canonical_config(hf: Any) -> ModelConfig:
    """The ModelConfig of a transformers config, written here independently of kttools.families."""
    rope = hf.rope_parameters
    yarn = None
    if rope["rope_type"] == "yarn":
        yarn = {key: rope[key] for key in YARN_KEYS}
        yarn.update({key: rope.get(key) for key in ("mscale", "mscale_all_dim", "attention_factor")})
        yarn["truncate"] = rope.get("truncate", True)
    return ModelConfig.from_dict(
        {
            **{key: getattr(hf, key) for key in SAME_KEYS},
            "moe_layers": list(range(hf.first_k_dense_replace, hf.num_hidden_layers)),
            "attention": "mla",
            "router": "sigmoid_bias_groups",
            "rope_theta": rope["rope_theta"],
            "rope_scaling": yarn,
            "bos_token_id": 0,
            "eos_token_ids": [1],
        }
    )


class DictWeights:
    """A WeightSource over a dict of canonical names; `<base>.weight` may be replaced by quantised parts."""

    def __init__(self, tensors: Weights) -> None:
        self.tensors = tensors

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.tensors or tuple(self.tensors[name].shape) != shape:
            raise InvalidInputError(f"{name}: missing or not of shape {shape}")
        return self.tensors[name]

    def linear(self, base: str, out_features: int, in_features: int) -> LinearWeights:
        weight = self.tensor(f"{base}.weight", (out_features, in_features))
        return LinearWeights(base, in_features, "float", {"weight": weight})


class TorchExperts:
    """The expert layer in plain float32 torch: gate, up [E, I, H], down [E, H, I]."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self.gate, self.up, self.down = gate.float(), up.float(), down.float()

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in range(self.gate.shape[0]):
            rows, slots = torch.where(expert_ids == expert)
            picked = x[rows].float()
            hidden = torch.nn.functional.silu(picked @ self.gate[expert].T) * (picked @ self.up[expert].T)
            out.index_add_(0, rows, hidden @ self.down[expert].T * expert_weights[rows, slots, None])
        return out


def split_experts(state: Weights, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up [E, I, H], down [E, H, I] of a layer in transformers' fused naming."""
    fused = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
    gate, up = fused.chunk(2, dim=1)
    return gate, up, state[f"model.layers.{layer}.mlp.experts.down_proj"]


def runtime_model(hf: Any, make_experts: Callable[..., Any] = TorchExperts, **options: Any) -> Model:
    """The runtime's model on the oracle's weights, float32 (the reference path), one torch thread."""
    state: Weights = hf.state_dict()
    config = canonical_config(hf.config)
    placement = Placement(DictWeights(state), torch.device("cpu"), torch.float32)

    def experts(layer: int) -> RoutedExperts:
        return RoutedExperts(make_experts(*split_experts(state, layer)), torch.float32)

    return build_model(config, placement, experts, **{"threads": 1, **options})
