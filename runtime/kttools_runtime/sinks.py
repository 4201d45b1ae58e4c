"""Attention whose softmax has one more logit per head, a learned sink without a value (gpt-oss).

With s the sink and L the log-sum-exp of a query's scores, the sink takes exp(s) / (exp(s) + exp(L)) of the
weights and gives nothing: the result is the one without a sink times sigmoid(L - s).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# torch's flash kernel for the CPU, which also returns L; scaled_dot_product_attention calls the same one.
_FLASH: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """[batch, heads, queries, dim] attending [batch, heads, context, dim] -> the shape of query.

    mask: added to the scores. sinks: float32, broadcast to [batch, heads, queries]; None: no sinks.
    """
    if sinks is None:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=is_causal, scale=scale
        )
    if query.is_cpu:
        out, sums = _FLASH(query, keys, values, 0.0, is_causal, attn_mask=mask, scale=scale)
    else:
        out, sums = _explicit(query, keys, values, scale, mask, is_causal)
    return out * torch.sigmoid(sums - sinks).unsqueeze(-1).to(out.dtype)


def _explicit(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The same from a matrix of scores: result and log-sum-exp."""
    scores = (query.to(torch.float32) @ keys.to(torch.float32).mT) * scale
    if is_causal:
        is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill(is_later, -torch.inf)
    if mask is not None:
        scores = scores + mask
    out = scores.softmax(dim=-1) @ values.to(torch.float32)
    return out.to(query.dtype), scores.logsumexp(dim=-1)
