"""MXFP4 as OpenAI's safetensors hold it: bytes `NAME_blocks` [.., K / 32, 16] and `NAME_scales` [.., K / 32].

A byte of a block holds two e2m1 codes, the low nibble first; a scale s stands for 2^(s - 127) (OCP
Microscaling Formats, 1.0). Every value is exact in bf16.
"""

import torch

from kttools_runtime.errors import CorruptFileError

from .base import Info

BLOCK = 32
CODE_BYTES = BLOCK // 2
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# 6 * 2^125 is the largest product that float32 and bf16 hold; 255 is e8m0's NaN.
LARGEST_SCALE = 252
DTYPE = "U8"


def check_pair(blocks: Info, scales: Info, where: str) -> tuple[int, ...]:
    """The decoded shape of blocks with these scales. Raises CorruptFileError when they do not fit."""
    expected = blocks.shape[:-1]
    is_block = len(blocks.shape) >= 3 and blocks.shape[-1] == CODE_BYTES and blocks.dtype == DTYPE
    if not is_block or scales.dtype != DTYPE or scales.shape != expected:
        got = f"{blocks.dtype} {list(blocks.shape)} and {scales.dtype} {list(scales.shape)}"
        raise CorruptFileError(
            f"{where}: expected {DTYPE} [.., K / {BLOCK}, {CODE_BYTES}] blocks and scales of the same "
            f"leading shape, got {got}"
        )
    return (*blocks.shape[:-2], blocks.shape[-2] * BLOCK)


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, where: str) -> torch.Tensor:
    """bf16 [.., K] of blocks [.., K / 32, 16] and scales [.., K / 32], both uint8.

    Raises CorruptFileError for a scale that is no number or whose products are none.
    """
    if scales.numel() and int(scales.max()) > LARGEST_SCALE:
        at = torch.nonzero(scales > LARGEST_SCALE)[0].tolist()
        raise CorruptFileError(f"{where}_scales: the scale at {at} is {int(scales[tuple(at)])}, too large")
    pairs = _PAIRS[blocks.to(torch.int32)]  # [.., K / 32, 16, 2]
    values = pairs.flatten(-2) * _POWERS[scales.to(torch.int32)].unsqueeze(-1)
    return values.flatten(-2).to(torch.bfloat16)


_CODES = torch.tensor(VALUES)
_PAIRS = torch.stack((_CODES.repeat(16), _CODES.repeat_interleave(16)), dim=-1)  # by byte: low, high
_POWERS = torch.ldexp(torch.ones(256), torch.arange(256) - 127)
