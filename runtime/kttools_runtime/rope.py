"""Rotary positions (arXiv 2104.09864), stretched where the config has a rope_scaling.

The rotation is one complex multiplication of adjacent pairs (x0, x1), (x2, x3), ... in place. Models with
`rope_interleave` false pair (x_i, x_{i + d/2}) instead: `pair_order` puts such pairs side by side once, in
the rows of the projections at load. Scores are dot products of two vectors in the same order, so nothing else
notices.
"""

import math

import torch
from torch import Tensor

from .config import ModelConfig
from .rope_scaling import LinearScaling, Llama3Scaling, YarnScaling

FIRST_POSITIONS = 512


class Rope:
    """cos + i sin of every pair at given positions, scaled by the config's `rope_cos_sin_scale`."""

    __slots__ = ("_table", "inverse_frequencies", "scale")

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.inverse_frequencies = inverse_frequencies(config).to(device)
        self.scale = torch.tensor(config.rope_cos_sin_scale, dtype=torch.float32, device=device)
        self._table = self._rotations(0)

    def rotations(self, start: int, num_tokens: int) -> Tensor:
        """complex64 [num_tokens, 1, qk_rope_head_dim / 2] for positions start, start + 1, ...

        A view of a table that grows with the positions asked for: 256 bytes each at DeepSeek-V3's size.
        """
        end = start + num_tokens
        if end > self._table.shape[0]:
            self._table = self._rotations(max(end, 2 * self._table.shape[0], FIRST_POSITIONS))
        return self._table[start:end]

    def _rotations(self, num_positions: int) -> Tensor:
        frequencies = self.inverse_frequencies
        positions = torch.arange(num_positions, dtype=torch.float32, device=frequencies.device)
        angles = positions[:, None, None] * frequencies
        return torch.polar(self.scale.expand_as(angles), angles)


def rotate_(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate x in place: x [num_tokens, heads, qk_rope_head_dim] float32, any strides. Returns x."""
    pairs = x.view(*x.shape[:-1], -1, 2)
    if _is_complex_viewable(pairs):
        torch.view_as_complex(pairs).mul_(rotations)
    else:  # an odd head dimension before the rotary part
        own = pairs.clone(memory_format=torch.contiguous_format)
        x.copy_(torch.view_as_real(torch.view_as_complex(own).mul_(rotations)).view(x.shape))
    return x


def _is_complex_viewable(pairs: Tensor) -> bool:
    return (pairs.storage_offset() | pairs.stride(0) | pairs.stride(1)) % 2 == 0


def pair_order(config: ModelConfig) -> list[int] | None:
    """Order of the qk_rope_head_dim rows that makes pairs adjacent; None where they already are."""
    if config.rope_interleave:
        return None
    half = config.qk_rope_head_dim // 2
    return [index for pair in range(half) for index in (pair, pair + half)]


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """float32 [qk_rope_head_dim / 2], in radians per position."""
    dim = config.qk_rope_head_dim
    base = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / base
    if isinstance(scaling, LinearScaling):
        return 1.0 / (scaling.factor * base)
    if isinstance(scaling, Llama3Scaling):
        kept = _llama3_kept_share(scaling, base)
    else:
        kept = _yarn_kept_share(scaling, dim, config.rope_theta)
    return kept / base + (1.0 - kept) / (scaling.factor * base)


def _llama3_kept_share(llama3: Llama3Scaling, base: Tensor) -> Tensor:
    """float32 [dim / 2]: 1 for pairs with short waves, 0 for those with long ones; base: 1 / frequency."""
    turns = llama3.original_max_position_embeddings / (2 * math.pi * base)
    width = llama3.high_freq_factor - llama3.low_freq_factor
    return ((turns - llama3.low_freq_factor) / width).clamp(0, 1)


def _yarn_kept_share(yarn: YarnScaling, dim: int, theta: float) -> Tensor:
    """float32 [dim / 2]: 1 where a pair turns often enough to keep its frequency, 0 where it is scaled."""

    def turning(rotations: float) -> float:
        """The (fractional) pair index that makes `rotations` turns within the original context."""
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(yarn.beta_fast), turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / width
    return 1.0 - ramp.clamp(0, 1)
