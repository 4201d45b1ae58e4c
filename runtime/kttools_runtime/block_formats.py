"""ggml's block formats as shards hold them: rows of blocks, bit for bit (docs/shards.md, "Blocks")."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import _kernels

BLOCKS_PART = "blocks"
HALF_BYTES = 2


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """inputs, bytes: of one block of a row; scales: where its float16 scales begin."""

    ggml: str
    inputs: int
    bytes: int
    scales: tuple[int, ...]

    def row_bytes(self, in_features: int) -> int | None:
        """None when the inputs do not fill whole blocks."""
        return None if in_features % self.inputs else in_features // self.inputs * self.bytes

    def in_features(self, row_bytes: int) -> int:
        return row_bytes // self.bytes * self.inputs


BLOCK_FORMATS: Mapping[str, BlockFormat] = {
    "q4_k": BlockFormat("Q4_K", 256, 144, (0, 2)),
    "q5_k": BlockFormat("Q5_K", 256, 176, (0, 2)),
    "q6_k": BlockFormat("Q6_K", 256, 210, (208,)),
    "q8_0": BlockFormat("Q8_0", 32, 34, (0,)),
}


def dequantized(form: str, rows: Tensor) -> Tensor:
    """[N, K] float32 of blocks uint8 [N, bytes], as ggml computes them."""
    values = _kernels.decode_ggml(BLOCK_FORMATS[form].ggml, rows.contiguous().view(-1).numpy())
    return torch.from_numpy(values).view(rows.shape[0], -1)


def first_bad_scale(form: str, rows: np.ndarray) -> tuple[int, int] | None:
    """(row, first input of the block) of the first scale that is not finite in uint8 [N, bytes]; or None."""
    block = BLOCK_FORMATS[form]
    blocks = rows.reshape(rows.shape[0], -1, block.bytes)
    bad = np.zeros(blocks.shape[:2], dtype=bool)
    for at in block.scales:
        scale = np.ascontiguousarray(blocks[..., at : at + HALF_BYTES]).view("<f2")[..., 0]
        bad |= ~np.isfinite(scale)
    if not bad.any():
        return None
    row, index = np.unravel_index(int(bad.argmax()), bad.shape)
    return int(row), int(index) * block.inputs
