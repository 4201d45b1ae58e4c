"""Device memory by part, from sizes alone: what load will hold, and what a plan can say before there is a file.

Weights are counted exactly as linears.py holds them; workspace and graph are bounds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..attention import HEAD_BLOCK_BYTES, QUERY_BLOCK_TOKENS
from ..config import ModelConfig
from ..model import DEFAULT_CHUNK_SIZE

FLOAT_SUFFIXES = ("norm.weight", "layernorm.weight", "gate.weight", "bias", "sinks")
# A CUDA context with torch's libraries and cuBLAS, and what a captured step of a layer takes; not measured here.
CONTEXT_BYTES = 600 << 20
GRAPH_LAYER_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A shard's tensor or linear: format "bf16", "int8" or "int4" (group_size then), shape [N, K] or [N]."""

    name: str
    format: str
    shape: tuple[int, ...]
    group_size: int = 0


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on one device."""

    weights: int
    experts: int
    cache: int
    workspace: int
    graph: int

    @property
    def total(self) -> int:
        return self.weights + self.experts + self.cache + self.workspace + self.graph


def held_bytes(tensor: StoredTensor) -> int:
    """One tensor on a device with bf16 activations. The embedding stays in RAM."""
    elements = 1
    for size in tensor.shape:
        elements *= size
    if tensor.name == "model.embed_tokens.weight":
        return 0
    if len(tensor.shape) == 1 or tensor.name.endswith(FLOAT_SUFFIXES):
        return 4 * elements
    if tensor.name.endswith("kv_b_proj.weight") or tensor.format == "bf16":
        return 2 * elements
    rows, inputs = tensor.shape
    if tensor.format == "int8":
        return elements + 4 * rows
    groups = -(-inputs // tensor.group_size)
    padded = -(-rows // 16) * 16
    return padded * (groups * tensor.group_size // 2 + 4 * groups) + 4 * rows


def layer_bytes(tensors: list[StoredTensor], num_layers: int) -> tuple[list[int], int]:
    """(bytes of each layer, bytes of the last norm and the head)."""
    layers, rest = [0] * num_layers, 0
    for tensor in tensors:
        parts = tensor.name.split(".")
        if parts[:2] == ["model", "layers"]:
            layers[int(parts[2])] += held_bytes(tensor)
        else:
            rest += held_bytes(tensor)
    return layers, rest


def workspace_bytes(config: ModelConfig, cache_len: int, chunk_size: int = DEFAULT_CHUNK_SIZE) -> int:
    """A bound of what a chunk of prompt takes beside weights and cache: it does not grow with the prompt.

    The residual stream and what is added to it, the projections of one layer, keys and values of a block of
    heads with a block's mask, or the experts' rows: the largest of the stages, each twice for temporaries.
    """
    chunk, heads = min(chunk_size, cache_len), config.num_attention_heads
    width = max(config.qk_head_dim, config.v_head_dim)
    stream = 8 * 4 * chunk * config.hidden_size
    keys = min(HEAD_BLOCK_BYTES, 4 * cache_len * heads * width) * 2
    mask = 8 * min(chunk, QUERY_BLOCK_TOKENS) * cache_len
    attention = keys + mask + 6 * 4 * chunk * heads * width
    inner = max(config.intermediate_size, config.num_experts_per_tok * config.moe_intermediate_size)
    mlp = 4 * 4 * chunk * inner
    expert = 3 * 4 * config.moe_intermediate_size * config.hidden_size if config.moe_layers else 0
    logits = 3 * 4 * config.vocab_size
    return stream + max(attention, mlp + expert, logits)


def plan_devices(
    config: ModelConfig,
    tensors: list[StoredTensor],
    layer_devices: list[int],
    cache_len: int,
    expert_bytes: Mapping[int, int] | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    is_simulated: bool = False,
) -> list[DeviceMemory]:
    """Bytes by part of every device. expert_bytes: of the hot experts of each layer."""
    layers, rest = layer_bytes(tensors, config.num_hidden_layers)
    count = max(layer_devices) + 1
    row = cache_row_bytes(config)
    result = []
    for device in range(count):
        own = [layer for layer, placed in enumerate(layer_devices) if placed == device]
        head = rest if device == count - 1 else 0
        result.append(
            DeviceMemory(
                weights=sum(layers[layer] for layer in own) + head,
                experts=sum((expert_bytes or {}).get(layer, 0) for layer in own),
                cache=len(own) * cache_len * row,
                workspace=workspace_bytes(config, cache_len, chunk_size),
                graph=0 if is_simulated else CONTEXT_BYTES + GRAPH_LAYER_BYTES * len(own),
            )
        )
    return result


def cache_row_bytes(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """One token of one layer."""
    return config.cache_width * dtype.itemsize
