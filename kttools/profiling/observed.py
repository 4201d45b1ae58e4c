"""Which tokens are observed: one of every N, drawn by hash, so that the same text gives the same tokens.

Outputs of single experts cost an engine call of their own; choices cost nothing. So choices are counted for
every token and outputs for a sample: the first token of a window (where attention sinks and very large
outputs live) and one token, drawn by hash, of every N after it. An observed token stands for `weight` tokens,
its stratum's size, so weighted sums estimate the sums over all tokens without bias, and their weights add up
to the number of tokens exactly.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .layerwise import Window

# Measured on ds3-tiny, see docs/recording.md.
DEFAULT_EVERY = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """Observed tokens of a batch of windows. rows int64 [S], ascending; weight float64 [S], tokens each
    stands for; is_first bool [S]: the first of its window."""

    rows: Tensor
    weight: Tensor
    is_first: Tensor


def draw(batch: Sequence[Window], every: int) -> Sample:
    """The sample of windows that lie one after the other in a batch. every 1: all tokens, weight 1."""
    rows, weights, first, start = [], [], [], 0
    for window in batch:
        own, stands_for = _window(window, every)
        rows.append(start + own)
        weights.append(stands_for)
        first.append(own == 0)
        start += len(window.token_ids)
    return Sample(*(torch.from_numpy(np.concatenate(part)) for part in (rows, weights, first)))


def _window(window: Window, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and weights: the first token, and one of each stratum of `every` tokens after it."""
    starts = np.arange(1, len(window.token_ids), every)
    sizes = np.minimum(every, len(window.token_ids) - starts)
    drawn = starts + _hashes(f"{window.domain}\n{window.document}", len(starts)) % sizes
    return np.concatenate([[0], drawn]), np.concatenate([[1.0], sizes.astype(np.float64)])


def _hashes(name: str, count: int) -> np.ndarray:
    """int64 [count] of 31 bits: splitmix64 (Steele, Lea and Flood, OOPSLA 2014) seeded by a name's SHA-256.

    Spelt out because numpy promises no stream of its generators from one version to the next.
    """
    seed = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], dtype="<u8")
    z = seed + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z >> np.uint64(33)).astype(np.int64)
