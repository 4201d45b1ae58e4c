"""Upper bounds of speed from the roofline: no engine reads fewer bytes or multiplies less per token."""

from dataclasses import dataclass

from kttools.bench.roofline import CeilingLog, Ceilings, floor_s
from kttools.bundle.inspect import parameter_counts
from kttools.families import Role
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.model import DEFAULT_CHUNK_SIZE

from .layout import Layout
from .memory import cache_bytes_per_token, held_bytes

OPS_PER_WEIGHT = 2  # a multiply and an add
# Twice the largest L3 of today's servers, read from end to end; bench takes twice as much and more time.
PROBE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Speed:
    """Bytes and operations of a token, and what the ceilings make of them.

    decode_bytes: chosen experts and dense weights; cache_bytes: of a full cache. chunk_tokens are prefilled
    at a time, and read chunk_bytes of weights (every expert is chosen by some token of a chunk).
    """

    ceilings: Ceilings
    expert_bytes: int
    dense_bytes: int
    cache_bytes: int
    token_ops: int
    head_ops: int
    chunk_tokens: int
    chunk_bytes: int

    @property
    def decode_bytes(self) -> int:
        return self.expert_bytes + self.dense_bytes

    @property
    def decode_ops(self) -> int:
        return self.token_ops + self.head_ops

    @property
    def decode_tokens_s(self) -> float:
        """With an empty cache."""
        return 1 / floor_s(self.ceilings, self.decode_bytes, self.decode_ops)

    @property
    def full_cache_tokens_s(self) -> float:
        """Decode with a full cache."""
        return 1 / floor_s(self.ceilings, self.decode_bytes + self.cache_bytes, self.decode_ops)

    @property
    def prefill_tokens_s(self) -> float:
        """Attention's own products, which grow with the prompt, are not counted."""
        return self.chunk_tokens / floor_s(
            self.ceilings, self.chunk_bytes, self.chunk_tokens * self.token_ops
        )


def speed(layout: Layout, cache_len: int, ceilings: Ceilings) -> Speed:
    """Upper bounds for a layout. The embedding is looked up, so it is read only where it is the head too."""
    config = layout.config
    dense = [t for t in layout.tensors if t.role is not Role.EMBEDDING or config.tie_word_embeddings]
    dense_read = sum(held_bytes(tensor, config) for tensor in dense)
    head_ops = OPS_PER_WEIGHT * config.vocab_size * config.hidden_size
    active = parameter_counts(config)["active"]
    return Speed(
        ceilings=ceilings,
        expert_bytes=layout.chosen_expert_bytes,
        dense_bytes=dense_read,
        cache_bytes=cache_len * cache_bytes_per_token(config),
        token_ops=OPS_PER_WEIGHT * active - head_ops,
        head_ops=head_ops,
        chunk_tokens=min(DEFAULT_CHUNK_SIZE, cache_len),
        chunk_bytes=min(layout.pack_bytes, layout.chosen_expert_bytes * min(DEFAULT_CHUNK_SIZE, cache_len))
        + dense_read,
    )


def measure(threads: int, numa: str, compute_format: str) -> Ceilings:
    """This machine's ceilings with the engine's own threads, in a second or a few."""
    import psutil

    from kttools.bench.layer import huge_memory

    size = min(PROBE_BYTES, psutil.virtual_memory().available // 4)
    memory = huge_memory(size)
    memory[::4096] = 1  # a page that was never written is the zero page, which any cache holds
    return CeilingLog(ExpertEngine(threads, numa=numa).native, memory, compute_format).measure()
