"""RAM of a loaded model by part, in bytes: what is mapped, what is anonymous."""

from dataclasses import dataclass

import torch

from kttools.families import Role
from kttools.quantize.plan import BASE_BYTES
from kttools_runtime import attention, gqa
from kttools_runtime.cache import KVCache
from kttools_runtime.config import ModelConfig
from kttools_runtime.model import DEFAULT_CACHE_LEN, DEFAULT_CHUNK_SIZE
from kttools_runtime.numa import NumaPlan, share_nodes

from .layout import DenseTensor, Layout

FLOAT_ROLES = frozenset({Role.NORM, Role.ROUTER, Role.ROUTER_BIAS, Role.ATTENTION_BIAS})


@dataclass(frozen=True, slots=True)
class RamPlan:
    """numa: how the mapped packs are shared; process: interpreter and libraries, with slack."""

    experts: int
    numa: NumaPlan
    dense: int
    cache: int
    scratch: int
    process: int = BASE_BYTES

    @property
    def copies(self) -> int:
        """Bytes of expert weights held beside the mapped packs (numa replicate)."""
        return self.numa.copied_bytes

    @property
    def anonymous(self) -> int:
        """Everything but the page cache."""
        return self.copies + self.dense + self.cache + self.scratch + self.process

    @property
    def total(self) -> int:
        return self.experts + self.anonymous


def ram_plan(layout: Layout, cache_len: int, numa: str, threads: int) -> RamPlan:
    """RAM of load() on the CPU with bf16 activations and a full cache of cache_len tokens."""
    return RamPlan(
        experts=layout.pack_bytes,
        numa=share_nodes(layout.pack_bytes, numa, threads),
        dense=dense_bytes(layout),
        cache=cache_len * cache_bytes_per_token(layout.config),
        scratch=scratch_bytes(layout, cache_len),
    )


def default_cache_len(config: ModelConfig) -> int:
    """What a model takes when nobody says."""
    return min(config.max_position_embeddings, DEFAULT_CACHE_LEN)


def cache_bytes_per_token(config: ModelConfig) -> int:
    """All layers, bf16."""
    return KVCache(config, 1, torch.bfloat16, torch.device("meta")).bytes_per_token


def dense_bytes(layout: Layout) -> int:
    """What load() holds of the shards."""
    return sum(held_bytes(tensor, layout.config) for tensor in layout.tensors)


def held_bytes(tensor: DenseTensor, config: ModelConfig) -> int:
    """One tensor in RAM: small ones are float32, kv_b is bf16 (so are its two halves in the kernels), other
    linears are repacked in the format they are stored in (strips are padded; not counted)."""
    if tensor.role in FLOAT_ROLES:
        return 4 * tensor.elements
    is_bf16 = tensor.name.endswith("kv_b_proj.weight") or (
        tensor.role is Role.EMBEDDING and config.tie_word_embeddings
    )
    return 2 * tensor.elements if is_bf16 else tensor.bytes


def scratch_bytes(layout: Layout, cache_len: int) -> int:
    """An estimate: activations of a chunk of the prompt, or the largest matrix while it is repacked."""
    largest = max((tensor.bytes for tensor in layout.tensors), default=0)
    return max(largest, _prefill_bytes(layout.config, cache_len))


def _prefill_bytes(config: ModelConfig, cache_len: int) -> int:
    chunk = min(DEFAULT_CHUNK_SIZE, cache_len)
    heads, is_mla = config.num_attention_heads, config.attention == "mla"
    limit = attention.HEAD_BLOCK_BYTES if is_mla else gqa.HEAD_BLOCK_BYTES
    width = max(config.qk_head_dim, config.v_head_dim)
    keys = min(limit, 4 * cache_len * heads * width)
    mask = 2 * min(chunk, attention.QUERY_BLOCK_TOKENS) * cache_len
    attended = 4 * chunk * heads * (config.qk_head_dim + 2 * config.v_head_dim)
    experts = config.num_experts_per_tok * (config.moe_intermediate_size + config.hidden_size)
    mlp = 4 * chunk * max(experts, 3 * config.intermediate_size)
    return keys + mask + 4 * 4 * chunk * config.hidden_size + max(attended, mlp)
