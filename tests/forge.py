"""Writes safetensors files and small checkpoints byte by byte, lies included; no code of the reader."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}

# A DeepSeek-V3 config.json of odd small sizes, as the hub writes it.
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 2,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "attention_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "bfloat16",
}


def config(**changes: Any) -> dict[str, Any]:
    """CONFIG with keys changed; a value of ... removes the key."""
    merged = copy.deepcopy(CONFIG) | changes
    return {key: value for key, value in merged.items() if value is not ...}


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file image from a header (a dict, or its exact bytes) and data; length lies about the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A valid file with the tensors in the given order."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor_bytes(tensor)
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    path.write_bytes(safetensors_bytes(header, data))


def save_sharded(directory: Path, tensors: dict[str, Tensor], shards: int, digits: int = 5) -> dict[str, str]:
    """Shards and index; digits: of the number after "of" (five, or DeepSeek's six)."""
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:0{digits}d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save(directory / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def hub_tensors(values: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random BF16 tensors for a config under the hub's names, one tensor per expert."""
    shapes: dict[str, tuple[int, ...]] = {}
    hidden, heads, rope = values["hidden_size"], values["num_attention_heads"], values["qk_rope_head_dim"]
    query_rows = heads * (values["qk_nope_head_dim"] + rope)
    for layer in range(values["num_hidden_layers"]):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
        if values["q_lora_rank"] is None:
            shapes[attention + "q_proj.weight"] = (query_rows, hidden)
        else:
            shapes[attention + "q_a_proj.weight"] = (values["q_lora_rank"], hidden)
            shapes[attention + "q_a_layernorm.weight"] = (values["q_lora_rank"],)
            shapes[attention + "q_b_proj.weight"] = (query_rows, values["q_lora_rank"])
        shapes[attention + "kv_a_proj_with_mqa.weight"] = (values["kv_lora_rank"] + rope, hidden)
        shapes[attention + "kv_a_layernorm.weight"] = (values["kv_lora_rank"],)
        kv_rows = heads * (values["qk_nope_head_dim"] + values["v_head_dim"])
        shapes[attention + "kv_b_proj.weight"] = (kv_rows, values["kv_lora_rank"])
        shapes[attention + "o_proj.weight"] = (hidden, heads * values["v_head_dim"])
        if layer < values["first_k_dense_replace"]:
            shapes |= _mlp(mlp, hidden, values["intermediate_size"])
            continue
        experts, inner = values["n_routed_experts"], values["moe_intermediate_size"]
        shapes[mlp + "gate.weight"] = (experts, hidden)
        shapes[mlp + "gate.e_score_correction_bias"] = (experts,)
        if values["n_shared_experts"]:
            shapes |= _mlp(mlp + "shared_experts.", hidden, inner * values["n_shared_experts"])
        for expert in range(experts):
            shapes |= _mlp(f"{mlp}experts.{expert}.", hidden, inner)
    shapes["model.embed_tokens.weight"] = (values["vocab_size"], hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not values["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (values["vocab_size"], hidden)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(
            torch.float32 if "e_score" in name else torch.bfloat16
        )
        for name, shape in shapes.items()
    }


def _mlp(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    wide = {f"{prefix}{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")}
    return wide | {f"{prefix}down_proj.weight": (hidden, inner)}


def stack_experts(
    tensors: dict[str, Tensor], values: dict[str, Any], fuse: bool, suffix: str = ""
) -> dict[str, Tensor]:
    """The same weights with each layer's experts stacked, gate and up fused or not."""
    result = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in range(values["first_k_dense_replace"], values["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors[f"{prefix}{e}.{name}.weight"] for e in range(values["n_routed_experts"])])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        result[f"{prefix}down_proj{suffix}"] = down
        if fuse:
            result[f"{prefix}gate_up_proj{suffix}"] = torch.cat([gate, up], dim=1)
        else:
            result |= {f"{prefix}gate_proj{suffix}": gate, f"{prefix}up_proj{suffix}": up}
    return result


def save_model(directory: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """config.json and one model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    save(directory / "model.safetensors", tensors)
    return directory
