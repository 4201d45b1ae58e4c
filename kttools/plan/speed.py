"""Upper bounds of speed from the roofline: no engine reads fewer bytes or multiplies less per token."""

from dataclasses import dataclass

from kttools.bench.roofline import CeilingLog, Ceilings, floor_s
from kttools.bundle.inspect import parameter_counts
from kttools_runtime.config import ModelConfig
from kttools_runtime.device_footprint import device_bytes
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.footprint import EMBEDDING, StoredTensor, cache_bytes_per_token, held_bytes
from kttools_runtime.model import DEFAULT_CHUNK_SIZE

from .layout import Layout

OPS_PER_WEIGHT = 2  # a multiply and an add
# Twice the largest L3 of today's servers, read from end to end; bench takes twice as much and more time.
PROBE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Speed:
    """Bytes and operations of a token, and what the ceilings make of them.

    ceilings: of the CPU; gpu: of one GPU, None without. expert_bytes: chosen experts; dense_bytes: everything
    else that a token reads, of which shared_bytes are the shared experts'; cache_bytes: of a full cache.
    hot_share: of the chosen experts that are on the GPU; hot_bytes: theirs.
    chunk_tokens are prefilled at a time, and read chunk_bytes of expert weights (every expert is chosen by
    some token of a chunk) and the dense ones.
    """

    ceilings: Ceilings
    gpu: Ceilings | None
    expert_bytes: int
    dense_bytes: int
    shared_bytes: int
    cache_bytes: int
    token_ops: int
    expert_ops: int
    head_ops: int
    chunk_tokens: int
    chunk_bytes: int
    hot_share: float = 0.0
    hot_bytes: int = 0

    @property
    def decode_bytes(self) -> int:
        return self.expert_bytes + self.dense_bytes

    @property
    def decode_tokens_s(self) -> float:
        """With an empty cache."""
        return 1 / self._decode_s(0)

    @property
    def full_cache_tokens_s(self) -> float:
        """Decode with a full cache."""
        return 1 / self._decode_s(self.cache_bytes)

    def _decode_s(self, cache_bytes: int) -> float:
        """On GPUs: what runs alone, then the slower of the routed experts on the CPU and the shared and hot
        ones on the GPU. Layers of several GPUs follow each other."""
        ops, dense = self.token_ops + self.head_ops, self.dense_bytes + cache_bytes
        if self.gpu is None:
            return floor_s(self.ceilings, self.expert_bytes + dense, ops)
        hot, cold = self.hot_share, 1 - self.hot_share
        alone = floor_s(self.gpu, dense - self.shared_bytes, ops - self.expert_ops)
        cpu = floor_s(self.ceilings, cold * self.expert_bytes, cold * self.expert_ops)
        gpu = floor_s(self.gpu, self.shared_bytes + self.hot_bytes, hot * self.expert_ops)
        return alone + max(cpu, gpu)

    @property
    def prefill_tokens_s(self) -> float:
        """Attention's own products, which grow with the prompt, are not counted."""
        tokens = self.chunk_tokens
        if self.gpu is None:
            return tokens / floor_s(
                self.ceilings, self.chunk_bytes + self.dense_bytes, tokens * self.token_ops
            )
        cold = 1 - self.hot_share
        dense = floor_s(self.gpu, self.dense_bytes, tokens * (self.token_ops - self.expert_ops))
        experts = floor_s(self.ceilings, cold * self.chunk_bytes, cold * tokens * self.expert_ops)
        return tokens / (dense + experts)


def speed(
    layout: Layout, cache_len: int, ceilings: Ceilings, gpu: Ceilings | None = None, hot_share: float = 0.0
) -> Speed:
    """Upper bounds for a layout. The embedding is looked up, so it is read only where it is the head too.

    hot_share: of a token's choices, those whose experts are on the GPUs.
    """
    config = layout.config
    dense = [t for t in layout.tensors if t.name != EMBEDDING or config.tie_word_embeddings]
    sizes = [_read_bytes(tensor, config, gpu is not None) for tensor in dense]
    shared = sum(n for tensor, n in zip(dense, sizes, strict=True) if ".shared_expert" in tensor.name)
    head_ops = OPS_PER_WEIGHT * config.vocab_size * config.hidden_size
    active = parameter_counts(config)["active"]
    chosen = len(config.moe_layers) * config.num_experts_per_tok
    chunk = min(DEFAULT_CHUNK_SIZE, cache_len)
    return Speed(
        ceilings=ceilings,
        gpu=gpu,
        expert_bytes=layout.chosen_expert_bytes,
        dense_bytes=sum(sizes),
        shared_bytes=shared,
        cache_bytes=cache_len * cache_bytes_per_token(config),
        token_ops=OPS_PER_WEIGHT * active - head_ops,
        expert_ops=OPS_PER_WEIGHT * 3 * chosen * config.hidden_size * config.moe_intermediate_size,
        head_ops=head_ops,
        chunk_tokens=chunk,
        chunk_bytes=min(layout.pack_bytes, layout.chosen_expert_bytes * chunk),
        hot_share=hot_share,
        hot_bytes=int(hot_share * chosen * layout.hot_expert_bytes),
    )


def _read_bytes(tensor: StoredTensor, config: ModelConfig, is_on_gpu: bool) -> int:
    """Of the two forms in which the CPU holds a router, decode reads the bf16 one."""
    if is_on_gpu:
        return device_bytes(tensor)[1]
    is_router = tensor.format is None and tensor.name.endswith(".gate.weight")
    return 2 * tensor.elements if is_router else held_bytes(tensor, config)


def measure(threads: int, numa: str, compute_format: str) -> Ceilings:
    """This machine's ceilings with the engine's own threads, in a second or a few."""
    from kttools_runtime.huge_pages import huge_memory
    from kttools_runtime.memory import available_bytes

    size = min(PROBE_BYTES, available_bytes() // 4)
    memory = huge_memory(size)
    memory[::4096] = 1  # a page that was never written is the zero page, which any cache holds
    return CeilingLog(ExpertEngine(threads, numa=numa).native, memory, compute_format).measure()
