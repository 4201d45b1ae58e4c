"""Multi-head latent attention (arXiv 2405.04434, 2.1) over the compressed cache.

Prefill goes through full heads: keys and values of the whole context are made from the latent, a bounded
block of heads at a time. Decode is absorbed: the query is taken into the latent space (q W_UK), attends there
as many queries on one key head, and only the result is expanded (W_UV), so that a step reads the cache as it
lies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from .config import ModelConfig
from .huge_pages import in_huge_pages
from .linear import LinearSpec, Placement
from .norm import RMSNorm
from .rope import pair_order, rotate_

# Keys and values that prefill holds at once, in bytes: 8 of DeepSeek-V3's heads at 32k tokens, all heads at
# 2k.
HEAD_BLOCK_BYTES = 256 << 20
# Queries after a context that are masked at once. A chunk of 1024 after 1024 tokens, 32 of DeepSeek-V3's
# heads, one thread: 133 ms whole, 135 in blocks of 512, 161 in blocks of 256.
QUERY_BLOCK_TOKENS = 512


@dataclass(frozen=True)
class Step:
    """What all layers share in one forward pass over new tokens at positions start, start + 1, ...

    rotations: complex64 [num_tokens, 1, qk_rope_head_dim / 2].
    """

    start: int
    num_tokens: int
    rotations: Tensor

    @cached_property
    def pairs(self) -> npt.NDArray[np.float32]:
        """The rotations on the CPU as [num_tokens, qk_rope_head_dim]: cosine and sine of each pair."""
        return torch.view_as_real(self.rotations).view(self.num_tokens, -1).numpy()


class LatentAttention:
    """x [num_tokens, hidden_size] float32 (normed) -> the same shape; appends to its layer of the cache."""

    def __init__(self, config: ModelConfig, placement: Placement, prefix: str) -> None:
        self.config = config
        self.dtype = placement.dtype
        heads, hidden_size = config.num_attention_heads, config.hidden_size
        self._build_inputs(placement, prefix)
        kv_b = LinearSpec(f"{prefix}.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim))
        self._split_kv_b(placement.matrix(kv_b, config.kv_lora_rank), placement)
        out = LinearSpec(f"{prefix}.o_proj", hidden_size, has_bias=config.attention_bias)
        self.o_proj = placement.linear(out, heads * config.v_head_dim)

    def _build_inputs(self, placement: Placement, prefix: str) -> None:
        """The projections of x: [q | q_a] and kv_a as one group; with q_lora_rank the second half of q."""
        config = self.config
        heads, rank, latent = config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
        kv_order = _row_order(config, leading=latent, blocks=1)
        q_order = _row_order(config, leading=config.qk_nope_head_dim, blocks=heads)
        width = latent + config.qk_rope_head_dim
        kv_a = LinearSpec(f"{prefix}.kv_a_proj_with_mqa", width, config.attention_bias, kv_order)
        if rank is None:
            query = LinearSpec(f"{prefix}.q_proj", heads * config.qk_head_dim, row_order=q_order)
        else:
            query = LinearSpec(f"{prefix}.q_a_proj", rank, config.attention_bias)
            self.q_norm = self._norm(placement, f"{prefix}.q_a_layernorm", rank)
            q_b = LinearSpec(f"{prefix}.q_b_proj", heads * config.qk_head_dim, row_order=q_order)
            self.q_b_proj = placement.linear(q_b, rank)
        self.inputs = placement.group([query, kv_a], config.hidden_size)
        self.kv_norm = self._norm(placement, f"{prefix}.kv_a_layernorm", latent)

    def _norm(self, placement: Placement, name: str, size: int) -> RMSNorm:
        eps = self.config.latent_norm_eps or self.config.rms_norm_eps
        return RMSNorm(placement.vector(f"{name}.weight", size), eps)

    def _split_kv_b(self, kv_b: Tensor, placement: Placement) -> None:
        """W_UK [heads, qk_nope_head_dim, kv_lora_rank] and W_UV [heads, v_head_dim, kv_lora_rank].

        bf16 where the CPU kernels decode with them (step.py). Else float32 on the CPU, also in bf16 mode:
        torch's batched bf16 product of one row takes 23 us where float32 takes 3 (ds3-tiny, Xeon with AMX,
        one thread, torch 2.13).
        """
        config = self.config
        is_wide = placement.device.type == "cpu" and not placement.uses_cpu_kernels
        dtype = torch.float32 if is_wide else placement.dtype
        per_head = kv_b.to(device=placement.device, dtype=dtype).view(
            config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank
        )
        self.w_uk = in_huge_pages(per_head[:, : config.qk_nope_head_dim])
        self.w_uv = in_huge_pages(per_head[:, config.qk_nope_head_dim :])

    def __call__(self, x: Tensor, step: Step, cache: Tensor) -> Tensor:
        """cache: this layer's [capacity, kv_lora_rank + qk_rope_head_dim]; rows start... are written here."""
        config = self.config
        query, kv = self.inputs(x)
        if config.q_lora_rank is not None:
            query = self.q_b_proj(self.q_norm.apply_(query))
        query = query.view(step.num_tokens, config.num_attention_heads, config.qk_head_dim)
        rotate_(query[..., config.qk_nope_head_dim :], step.rotations)
        end = step.start + step.num_tokens
        self.kv_norm.apply_(kv[:, : config.kv_lora_rank])
        rotate_(kv[:, None, config.kv_lora_rank :], step.rotations)
        cache[step.start : end].copy_(kv)
        if step.num_tokens == 1:
            return self.o_proj(self._absorbed(query, cache[:end]))
        return self.o_proj(self._full(query, cache[:end], step))

    def _absorbed(self, query: Tensor, context: Tensor) -> Tensor:
        """One token: query [1, heads, qk_head_dim] -> [1, heads * v_head_dim].

        The heads are the rows of one attention problem with a single key head; the cached row is both key and
        value, and the rotary columns of the result are dropped: no copy of the cache, no mask.
        """
        nope, latent = self.config.qk_nope_head_dim, self.config.kv_lora_rank
        per_head = query.transpose(0, 1).to(self.w_uk.dtype)
        absorbed = torch.bmm(per_head[..., :nope], self.w_uk)
        rows = torch.cat((absorbed, per_head[..., nope:]), dim=-1).to(context.dtype)
        keys = context[None, None]
        attended = functional.scaled_dot_product_attention(
            rows.view(1, 1, len(rows), -1), keys, keys, scale=self.config.softmax_scale
        )
        latents = attended.view(rows.shape)[..., :latent].to(self.w_uv.dtype)
        return torch.bmm(latents, self.w_uv.mT).view(1, -1).to(torch.float32)

    def _full(self, query: Tensor, context: Tensor, step: Step) -> Tensor:
        """query [num_tokens, heads, qk_head_dim] -> [num_tokens, heads * v_head_dim].

        Scores and masks of bounded blocks alone are in memory, never [num_tokens, context].
        """
        config = self.config
        out = query.new_empty(step.num_tokens, config.num_attention_heads, config.v_head_dim)
        width = max(config.qk_head_dim, config.v_head_dim)
        head_bytes = 2 * context.shape[0] * width * context.element_size()
        block = max(1, HEAD_BLOCK_BYTES // head_bytes)
        for first in range(0, config.num_attention_heads, block):
            heads = slice(first, first + block)
            keys, values = self._expand(context, heads, width)
            rows = functional.pad(query[:, heads].to(self.dtype), (0, width - config.qk_head_dim))
            for begin, end, mask in self._query_blocks(step):
                seen = step.start + end
                attended = functional.scaled_dot_product_attention(
                    rows[begin:end].transpose(0, 1)[None],
                    keys[:seen].transpose(0, 1)[None],
                    values[:seen].transpose(0, 1)[None],
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=config.softmax_scale,
                )
                out[begin:end, heads] = attended[0, :, :, : config.v_head_dim].transpose(0, 1)
        return out.view(step.num_tokens, -1)

    def _query_blocks(self, step: Step) -> Iterator[tuple[int, int, Tensor | None]]:
        """(begin, end, mask [end - begin, start + end]) of blocks of queries.

        At the beginning of a sequence one block without a mask: torch's flash kernel is causal by itself and
        no faster in blocks (2048 tokens, DeepSeek-V3's heads: 146 ms whole, 202 in blocks of 512).
        """
        if step.start == 0:
            yield 0, step.num_tokens, None
            return
        for begin in range(0, step.num_tokens, QUERY_BLOCK_TOKENS):
            end = min(begin + QUERY_BLOCK_TOKENS, step.num_tokens)
            shape = (end - begin, step.start + end)
            mask = torch.full(shape, -torch.inf, dtype=self.dtype, device=self.w_uk.device)
            yield begin, end, mask.triu_(step.start + begin + 1)

    def _expand(self, context: Tensor, heads: slice, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values [context, heads, width] of some heads, zero-padded to one width.

        torch's CPU flash attention wants equal widths; without it the scores of a chunk are materialised and
        prefill takes six times as long (512 tokens of ds3-tiny: 9.1 ms against 1.4).
        """
        config = self.config
        nope, latent = config.qk_nope_head_dim, config.kv_lora_rank
        compressed = context[:, :latent]
        keys = self._up(compressed, self.w_uk[heads], width)
        keys[..., nope : config.qk_head_dim] = context[:, None, latent:]
        return keys, self._up(compressed, self.w_uv[heads], width)

    def _up(self, compressed: Tensor, weight: Tensor, width: int) -> Tensor:
        """[context, kv_lora_rank] times [heads, dim, kv_lora_rank] -> [context, heads, width]."""
        heads, dim, latent = weight.shape
        flat = weight.reshape(heads * dim, latent).to(compressed.dtype)
        per_head = functional.linear(compressed, flat).view(-1, heads, dim)
        return per_head if dim == width else functional.pad(per_head, (0, width - dim))


def _row_order(config: ModelConfig, leading: int, blocks: int) -> Tensor | None:
    """Row order of a projection made of `blocks` x (leading rows, rotary rows); see rope.pair_order."""
    pairs = pair_order(config)
    if pairs is None:
        return None
    block = torch.tensor([*range(leading), *(leading + index for index in pairs)])
    starts = torch.arange(blocks)[:, None] * block.numel()
    return (starts + block).flatten()
