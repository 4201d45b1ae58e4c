"""How many threads torch may use for one forward pass.

Linears and experts run in our own pool; torch's OpenMP team is left with attention, router and norms. A
parallel region of it costs a few microseconds on an idle machine, but when another process (or our own pool)
holds a core each region may wait a whole time slice, 4 ms: ds3-tiny on two busy cores decoded 15 tokens/s
with two torch threads, 260 with one. So torch gets its team only where the attention of a layer is long
compared with that.
"""

import torch

from .config import ModelConfig

# Estimated time of one layer's attention on one core from which a team pays, in microseconds.
TEAM_PAYS_US = 4000.0
# One Sapphire Rapids core: multiply-adds per microsecond that attention reaches, and bytes of memory read.
MACS_PER_US = {torch.bfloat16: 2e5, torch.float32: 5e4}
BYTES_PER_US = 16e3


# Elements of logits from which the arithmetic that follows them (log_softmax, sums by row) pays a team.
TEAM_ELEMENTS = 1 << 22


def attention_us(config: ModelConfig, dtype: torch.dtype, start: int, num_tokens: int) -> float:
    """Estimated time of one layer's attention on one core, in microseconds."""
    heads, context = config.num_attention_heads, start + num_tokens
    if config.attention == "gqa":
        return _gqa_us(config, dtype, start, num_tokens)
    kv_b = heads * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    if num_tokens == 1:  # absorbed
        macs = context * heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    else:
        pairs = num_tokens * (start + num_tokens / 2)
        macs = int(context * kv_b + pairs * heads * (config.qk_head_dim + config.v_head_dim))
    return 4 * kv_b / BYTES_PER_US + macs / MACS_PER_US[dtype]  # kv_b's float32 weights are read once


def _gqa_us(config: ModelConfig, dtype: torch.dtype, start: int, num_tokens: int) -> float:
    """Scores and sums of every query with the keys before it; at decode the cache is read once."""
    pairs = num_tokens * (start + num_tokens / 2)
    macs = 2 * pairs * config.num_attention_heads * config.qk_head_dim
    read_bytes = (start + num_tokens) * config.cache_width * dtype.itemsize
    return max(macs / MACS_PER_US[dtype], read_bytes / BYTES_PER_US)


def set_torch_threads(
    config: ModelConfig, dtype: torch.dtype, threads: int, start: int, num_tokens: int
) -> None:
    """Torch's thread count for the coming pass: `threads` where a team pays, else 1."""
    wanted = threads
    if threads > 1 and attention_us(config, dtype, start, num_tokens) < TEAM_PAYS_US:
        wanted = 1
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


def set_threads_for_logits(threads: int, num_rows: int, vocab_size: int) -> None:
    """After many rows of logits their owner has arithmetic on all: `threads` for it where that pays."""
    if num_rows * vocab_size >= TEAM_ELEMENTS and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
