"""Grouped-query attention (arXiv 2305.13245) over a cache of keys and values.

Several query heads share one key head. Prefill goes through blocks of queries, so that a mask is never more
than one block times its context; torch's flash attention keeps the scores of a block in its own tiles. Decode
is one row of scores per query head over the cache as it lies.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .attention import Step
from .config import ModelConfig
from .linear import LinearSpec, Placement
from .norm import RMSNorm
from .rope import pair_order, rotate_
from .sinks import attend

# Queries of one block where a mask is needed (cached context, or a window): at 32k tokens of context its mask
# takes 32 MB in bf16. 1024 queries on 4096 tokens, 32 heads on 4 of 128 (Xeon with AMX, one thread, torch
# 2.13): 424 ms in blocks of 128, 280 of 256, 256 of 512, 266 as one.
QUERY_BLOCK_TOKENS = 512
# Keys and values that torch's bf16 kernel lays out anew for every query head, in bytes: 32 heads on 4 take
# 537 MB at 32k tokens, one key head and its 8 take 134.
HEAD_BLOCK_BYTES = 128 << 20


class GroupedQueryAttention:
    """x [num_tokens, hidden_size] float32 (normed) -> the same shape; appends to its layer of the cache.

    window: positions that a query sees, its own included; None: all before it.
    """

    def __init__(
        self, config: ModelConfig, placement: Placement, prefix: str, window: int | None = None
    ) -> None:
        self.config = config
        self.dtype = placement.dtype
        self.device = placement.device
        self.window = window
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.qk_head_dim
        order = _head_order(config)
        has_bias = config.attention_bias
        specs = [
            LinearSpec(f"{prefix}.q_proj", heads * dim, has_bias, _row_order(order, heads)),
            LinearSpec(f"{prefix}.k_proj", kv_heads * dim, has_bias, _row_order(order, kv_heads)),
            LinearSpec(f"{prefix}.v_proj", kv_heads * dim, has_bias),
        ]
        self.inputs = placement.group(specs, config.hidden_size)
        out = LinearSpec(f"{prefix}.o_proj", config.hidden_size, config.attention_output_bias)
        self.o_proj = placement.linear(out, heads * dim)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                self._norm(placement, f"{prefix}.{name}.weight", order) for name in ("q_norm", "k_norm")
            )

        self.sinks: Tensor | None = None  # [key heads, heads of a group]
        if config.attention_sinks:
            self.sinks = placement.vector(f"{prefix}.sinks", heads).view(kv_heads, -1)

    def _norm(self, placement: Placement, name: str, order: Tensor | None) -> RMSNorm:
        """The norm of one head; its weight follows the order of the projection's rows."""
        weight = placement.vector(name, self.config.qk_head_dim)
        if order is not None:
            weight = weight[order.to(weight.device)]
        return RMSNorm(weight, self.config.rms_norm_eps)

    def __call__(self, x: Tensor, step: Step, cache: Tensor) -> Tensor:
        """cache: this layer's [capacity, 2 * kv_heads * head_dim]; rows start... are written here."""
        config = self.config
        kv_heads, dim = config.num_key_value_heads, config.qk_head_dim
        query, key, value = self.inputs(x)
        query = self._positioned(query.view(step.num_tokens, -1, dim), self.q_norm, step)
        key = self._positioned(key.view(step.num_tokens, kv_heads, dim), self.k_norm, step)
        end = step.start + step.num_tokens
        rows = cache[step.start : end]
        rows[:, : kv_heads * dim].copy_(key.view(step.num_tokens, -1))
        rows[:, kv_heads * dim :].copy_(value)
        # [context, 2, kv_heads, dim] -> keys and values [1, kv_heads, context, dim], views of the cache
        keys, values = cache[:end].view(end, 2, kv_heads, dim).permute(1, 2, 0, 3)[:, None]
        run = self._decode if step.num_tokens == 1 else self._prefill
        return self.o_proj(run(query.to(self.dtype), keys, values, step.start).to(torch.float32))

    def _positioned(self, heads: Tensor, norm: RMSNorm | None, step: Step) -> Tensor:
        """heads [num_tokens, heads, head_dim] float32, normed and rotated in place."""
        if norm is not None:
            norm.apply_(heads)
        rotate_(heads[..., : self.config.qk_rope_head_dim], step.rotations)
        return heads

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """query [1, heads, head_dim] -> [1, heads * head_dim].

        The query heads of a group are the rows of one problem on their key head: no mask, no copy.
        """
        first = 0 if self.window is None else max(0, position + 1 - self.window)
        rows = query.view(1, keys.shape[1], -1, query.shape[-1])
        attended = attend(
            rows, keys[:, :, first:], values[:, :, first:], scale=self.config.softmax_scale, sinks=self.sinks
        )
        return attended.reshape(1, -1)

    def _prefill(self, query: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """query [num_tokens, heads, head_dim] at positions start... -> [num_tokens, heads * head_dim]."""
        num_tokens, heads, dim = query.shape
        kv_heads = keys.shape[1]
        # Key heads are the batch, the heads of a group share its keys through a stride of 0.
        grouped = query.view(num_tokens, kv_heads, -1, dim).permute(1, 2, 0, 3)
        keys, values = (side.transpose(0, 1).expand(-1, grouped.shape[1], -1, -1) for side in (keys, values))
        out = query.new_empty(num_tokens, kv_heads, heads // kv_heads, dim)
        is_whole = start == 0 and (self.window is None or num_tokens <= self.window)
        block = num_tokens if is_whole else QUERY_BLOCK_TOKENS
        for begin in range(0, num_tokens, block):
            end = min(begin + block, num_tokens)
            first = self._first_seen(start + begin)
            seen = slice(first, start + end)
            mask = None if is_whole else self._mask(start + begin, start + end, first)
            for groups in self._group_blocks(start + end - first):
                attended = attend(
                    grouped[groups, :, begin:end],
                    keys[groups, :, seen],
                    values[groups, :, seen],
                    mask=mask,
                    is_causal=is_whole,
                    scale=self.config.softmax_scale,
                    sinks=None if self.sinks is None else self.sinks[groups, :, None],
                )
                out[begin:end, groups] = attended.permute(2, 0, 1, 3)
        return out.view(num_tokens, -1)

    def _group_blocks(self, context: int) -> Iterator[slice]:
        """Key heads at a time, such that torch's copies of their keys and values stay in bounds."""
        config = self.config
        group_bytes = 2 * config.num_attention_heads // config.num_key_value_heads * config.qk_head_dim
        group_bytes *= context * self.dtype.itemsize
        block = max(1, HEAD_BLOCK_BYTES // group_bytes)
        for first in range(0, config.num_key_value_heads, block):
            yield slice(first, first + block)

    def _first_seen(self, position: int) -> int:
        return 0 if self.window is None else max(0, position + 1 - self.window)

    def _mask(self, begin: int, end: int, first: int) -> Tensor:
        """0 where the query at begin... (rows) sees the key at first... (columns), else minus infinity."""
        queries = torch.arange(begin, end, device=self.device)[:, None]
        keys = torch.arange(first, end, device=self.device)
        is_seen = keys <= queries
        if self.window is not None:
            is_seen &= keys > queries - self.window
        mask = torch.zeros(is_seen.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(is_seen.logical_not_(), -torch.inf)


def _head_order(config: ModelConfig) -> Tensor | None:
    """Order of a head's rows that makes rotary pairs adjacent (see rope.pair_order); they come first."""
    pairs = pair_order(config)
    if pairs is None:
        return None
    return torch.tensor([*pairs, *range(config.qk_rope_head_dim, config.qk_head_dim)])


def _row_order(order: Tensor | None, heads: int) -> Tensor | None:
    if order is None:
        return None
    return (torch.arange(heads)[:, None] * order.numel() + order).flatten()
