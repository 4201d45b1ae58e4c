"""One token of attention with every varying number in a tensor, so that the step can be captured.

The same modules as attention.py and gqa.py, and the same arithmetic; what they slice by the position is here
a fixed stretch of the cache under a mask. The scores are one row a head: nothing of size [tokens, tokens].
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kttools_runtime.attention import LatentAttention
from kttools_runtime.errors import UnsupportedModelError
from kttools_runtime.gqa import GroupedQueryAttention
from kttools_runtime.rope import rotate_
from kttools_runtime.sinks import attend as attend_heads


@dataclass(slots=True)
class StaticStep:
    """position: int64 [1]. rotations: complex64 [1, 1, rope / 2]. seen: cached tokens that are looked at.

    masks: float [1, seen], 0 or minus infinity, by window (None: no window).
    """

    position: Tensor
    rotations: Tensor
    seen: int
    masks: dict[int | None, Tensor]


def step_masks(
    position: Tensor, seen: int, windows: set[int | None], dtype: torch.dtype
) -> dict[int | None, Tensor]:
    """The masks of one token at `position` for every window of the layers."""
    keys = torch.arange(seen, device=position.device)[None]
    masks = {}
    for window in windows:
        is_hidden = keys > position
        if window is not None:
            is_hidden = is_hidden | (keys <= position - window)
        zeros = torch.zeros(1, seen, dtype=dtype, device=position.device)
        masks[window] = zeros.masked_fill(is_hidden, -torch.inf)
    return masks


def window_of(attention: LatentAttention | GroupedQueryAttention) -> int | None:
    return attention.window if isinstance(attention, GroupedQueryAttention) else None


def attend(
    attention: LatentAttention | GroupedQueryAttention, x: Tensor, step: StaticStep, cache: Tensor
) -> Tensor:
    """x [1, hidden_size] float32 (normed) -> the same shape; row `position` of the cache is written."""
    if isinstance(attention, LatentAttention):
        return _latent(attention, x, step, cache)
    if type(attention) is GroupedQueryAttention:
        return _grouped(attention, x, step, cache)
    raise UnsupportedModelError(f"no captured decode step for {type(attention).__name__}")


def _latent(attention: LatentAttention, x: Tensor, step: StaticStep, cache: Tensor) -> Tensor:
    config = attention.config
    nope, latent = config.qk_nope_head_dim, config.kv_lora_rank
    query, kv = attention.inputs(x)
    if config.q_lora_rank is not None:
        query = attention.q_b_proj(attention.q_norm.apply_(query))
    query = query.view(1, config.num_attention_heads, config.qk_head_dim)
    rotate_(query[..., nope:], step.rotations)
    attention.kv_norm.apply_(kv[:, :latent])
    rotate_(kv[:, None, latent:], step.rotations)
    cache.index_copy_(0, step.position, kv.to(cache.dtype))
    context = cache[: step.seen]
    per_head = query.transpose(0, 1).to(attention.w_uk.dtype)
    absorbed = torch.bmm(per_head[..., :nope], attention.w_uk)
    rows = torch.cat((absorbed, per_head[..., nope:]), dim=-1).to(context.dtype)
    keys = context[None, None]
    attended = functional.scaled_dot_product_attention(
        rows.view(1, 1, len(rows), -1),
        keys,
        keys,
        attn_mask=step.masks[None].expand(len(rows), -1),
        scale=config.softmax_scale,
    )
    latents = attended.view(rows.shape)[..., :latent].to(attention.w_uv.dtype)
    out = torch.bmm(latents, attention.w_uv.mT).view(1, -1).to(torch.float32)
    return attention.o_proj(out)


def _grouped(attention: GroupedQueryAttention, x: Tensor, step: StaticStep, cache: Tensor) -> Tensor:
    config = attention.config
    kv_heads, dim, rope = config.num_key_value_heads, config.qk_head_dim, config.qk_rope_head_dim
    query, key, value = attention.inputs(x)
    query, key = query.view(1, -1, dim), key.view(1, kv_heads, dim)
    for heads, norm in ((query, attention.q_norm), (key, attention.k_norm)):
        if norm is not None:
            norm.apply_(heads)
        rotate_(heads[..., :rope], step.rotations)
    row = torch.cat((key.view(1, -1), value), dim=-1)
    cache.index_copy_(0, step.position, row.to(cache.dtype))
    keys, values = cache[: step.seen].view(step.seen, 2, kv_heads, dim).permute(1, 2, 0, 3)[:, None]
    grouped = query.to(attention.dtype).view(1, kv_heads, -1, dim)
    mask = step.masks[attention.window].expand(grouped.shape[2], -1)
    attended = attend_heads(
        grouped, keys, values, mask=mask, scale=config.softmax_scale, sinks=attention.sinks
    )
    return attention.o_proj(attended.reshape(1, -1).to(torch.float32))
