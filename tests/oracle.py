"""transformers' DeepseekV3ForCausalLM as the oracle, and its weights as a WeightSource for the runtime.

The oracle is independent code in float32. Its random weights are exact in bfloat16, so that storing them in a
checkpoint or a pack changes nothing, and scaled so that every layer matters: an error anywhere moves the
logits.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kttools_runtime import _kernels
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.linear import Placement
from kttools_runtime.model import Model, build_model
from kttools_runtime.moe import RoutedExperts
from kttools_runtime.tokenizer import Tokenizer
from kttools_runtime.weights import PARTS, LinearWeights

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
    "latents_have_their_own_epsilon": {"rms_norm_eps": 1e-2},
    "odd_heads": {"qk_nope_head_dim": 17, "qk_rope_head_dim": 6, "v_head_dim": 27, "kv_lora_rank": 33},
}


def hf_model(overrides: dict[str, Any], seed: int = 0) -> Any:
    """A random DeepseekV3ForCausalLM in float32 with bf16-exact weights; skips without transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers (dev dependency) is the oracle")
    config = transformers.DeepseekV3Config(**{**BASE, **overrides})
    config._attn_implementation = "eager"
    model = transformers.DeepseekV3ForCausalLM(config).eval().to(torch.float32)
    randomise(model, seed)
    return model


def randomise(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            if name.endswith("inv_freq") or tensor.numel() == 0:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(_scaled(name, noise).to(torch.bfloat16))


def _scaled(name: str, noise: Tensor) -> Tensor:
    if name.endswith("norm.weight"):
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
            **({} if hf.rms_norm_eps == 1e-6 else {"latent_norm_eps": 1e-6}),
            "bos_token_id": 0,
            "eos_token_ids": [1],
        }
    )


class DictWeights:
    """A WeightSource over a dict of canonical names, its matrices quantised on the way out.

    linear_format: "bf16" (as they are), "int8" or "int4" (groups of `group_size`).
    """

    def __init__(self, tensors: Weights, linear_format: str = "bf16", group_size: int = 128) -> None:
        self.tensors = tensors
        self.linear_format = linear_format
        self.group_size = group_size

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.tensors or tuple(self.tensors[name].shape) != shape:
            raise InvalidInputError(f"{name}: missing or not of shape {shape}")
        return self.tensors[name]

    def linear(self, base: str, out_features: int, in_features: int) -> LinearWeights:
        weight = self.tensor(f"{base}.weight", (out_features, in_features))
        return quantized(base, weight, self.linear_format, self.group_size)


def quantized(base: str, weight: Tensor, linear_format: str, group_size: int = 128) -> LinearWeights:
    """A matrix as a shard would hold it."""
    if linear_format == "bf16":
        return LinearWeights(base, weight.shape[1], "float", {"weight": weight.to(torch.bfloat16)})
    array = weight.to(torch.float32).contiguous().numpy()
    if linear_format == "int8":
        arrays = _kernels.quantize_int8(array)
    else:
        arrays = _kernels.quantize_int4(array, group_size)
    parts = dict(zip(PARTS[linear_format], map(torch.from_numpy, arrays), strict=True))
    return LinearWeights(base, weight.shape[1], linear_format, parts)


def split_experts(state: Weights, layer: int) -> list[Tensor]:
    """gate, up [E, I, H], down [E, H, I] of a layer in transformers' fused naming."""
    gate, up = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
    down = state[f"model.layers.{layer}.mlp.experts.down_proj"]
    return [tensor.contiguous() for tensor in (gate, up, down)]


def runtime_model(
    hf: Any,
    dtype: torch.dtype = torch.float32,
    expert_format: str = "bf16",
    linear_format: str = "bf16",
    threads: int = 1,
    isa: str | None = None,
    **options: Any,
) -> Model:
    """The runtime's model on the oracle's weights, in memory; the defaults are the reference path."""
    state: Weights = hf.state_dict()
    engine = ExpertEngine(threads, isa)
    source = DictWeights(state, linear_format)
    placement = Placement(source, torch.device("cpu"), dtype, engine.native)
    input_dtype = dtype if expert_format == "bf16" else torch.float32

    def experts(layer: int) -> RoutedExperts:
        made = engine.layer_from_tensors(*split_experts(state, layer), format=expert_format)
        return RoutedExperts(made, input_dtype)

    return build_model(canonical_config(hf.config), placement, experts, threads=threads, **options)


def trained_model(directory: Path) -> Any:
    """A trained DeepseekV3ForCausalLM in float32; skips without transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers (dev dependency) is the oracle")
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def text_tokens(checkpoint: Path, jsonl: Path, num_tokens: int) -> Tensor:
    """int64 [<= num_tokens]: the first documents of a corpus, each from its beginning, in one row."""
    tokenizer = Tokenizer(checkpoint)
    token_ids: list[int] = []
    with jsonl.open(encoding="utf-8") as lines:
        for line in lines:
            token_ids += tokenizer.encode(json.loads(line)["text"])
            if len(token_ids) >= num_tokens:
                break
    return torch.tensor(token_ids[:num_tokens])
