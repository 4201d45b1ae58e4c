"""FP8 checkpoints as DeepSeek-V3, R1 and V3.1 ship them: e4m3 codes with a float scale per block.

`name` holds F8_E4M3 codes [N, K], `name_scale_inv` a float [ceil(N / rows), ceil(K / columns)]; the weight is
code * scale, rounded to bf16 as in DeepSeek's own conversion to BF16. The block (128 x 128) is
quantization_config.weight_block_size of config.json. Stacked experts have one more leading dimension on both.
"""

from dataclasses import dataclass
from typing import Any

import torch

from kttools_runtime import _kernels
from kttools_runtime.errors import CorruptFileError, InvalidInputError, UnsupportedModelError
from kttools_runtime.safetensors_file import TensorInfo

from .base import DecodedInfo, Info, Stored, WeightsView
from .safetensors import Checkpoint

SCALE_SUFFIX = "_scale_inv"
SCALE_DTYPES = ("F32", "BF16")
CODE_DTYPE = "F8_E4M3"
NAN_CODE = 0x7F  # with either sign, the only code of e4m3 that is no number
MAX_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """The block that shares a scale, in rows and columns."""

    rows: int
    columns: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of codes of this shape."""
        return (*shape[:-2], -(-shape[-2] // self.rows), -(-shape[-1] // self.columns))


def read_quantization_config(value: Any, where: str) -> BlockFormat | None:
    """quantization_config of a config.json; None when there is none.

    Raises UnsupportedModelError for another method than FP8 in blocks, InvalidInputError for a bad block.
    """
    if value is None:
        return None
    key = f"{where}: quantization_config"
    method = value.get("quant_method") if isinstance(value, dict) else value
    remedy = "checkpoints may be BF16, F16, F32 or FP8 (e4m3 with weight_block_size)"
    if not isinstance(value, dict) or method != "fp8":
        raise UnsupportedModelError(f"{key} {method!r:.80} is not supported: {remedy}")
    if value.get("fmt", "e4m3") != "e4m3":
        raise UnsupportedModelError(f"{key}.fmt {value['fmt']!r:.80} is not supported: {remedy}")
    block = value.get("weight_block_size")
    if block is None:
        raise UnsupportedModelError(f"{key} without weight_block_size is not supported: {remedy}")
    is_pair = isinstance(block, list) and len(block) == 2
    if not is_pair or not all(type(side) is int and 1 <= side <= MAX_BLOCK for side in block):
        raise InvalidInputError(
            f"{key}.weight_block_size must be two integers in 1..{MAX_BLOCK}, got {block!r:.80}"
        )
    return BlockFormat(*block)


class Fp8Checkpoint(WeightsView[Checkpoint]):
    """A safetensors checkpoint whose FP8 tensors read as bf16; scales belong to their codes and are hidden.

    Raises CorruptFileError when codes lack their scales, scales their codes, or shapes do not fit.
    """

    def __init__(self, plain: Checkpoint, block: BlockFormat) -> None:
        super().__init__(plain)
        self._block = block
        self._scales = {
            name: scale for name in plain.names() if (scale := self._scale_of(plain.info(name))) is not None
        }
        hidden = {scale.name for scale in self._scales.values()}
        for name in plain.names():
            if name.endswith(SCALE_SUFFIX) and name not in hidden:
                owner = name.removesuffix(SCALE_SUFFIX)
                problem = f"tensor {name!r:.200} has no {CODE_DTYPE} tensor {owner!r:.200} it belongs to"
                raise CorruptFileError(f"{plain.info(name).file}: {problem}")
        self._names = dict.fromkeys(name for name in plain.names() if name not in hidden)

    def info(self, name: str) -> Info:
        """Raises InvalidInputError for a name the checkpoint does not have."""
        info = self._plain.info(name)
        return DecodedInfo(name, "BF16", info.shape, info.file) if name in self._scales else info

    def stored(self, name: str) -> Stored:
        stored = self._plain.stored(name)
        scale = self._scales.get(name)
        return Stored(stored.dtype, stored.bytes + scale.bytes) if scale else stored

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor; FP8 as bf16."""
        if name not in self._scales:
            return self._plain.read(name)
        shape = self._plain.info(name).shape
        if len(shape) == 2:
            return self.read_rows(name, 0, shape[0])
        return torch.stack([self.read_slice(name, index) for index in range(shape[0])])

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        """Slice [index] of the leading dimension; the rest of the tensor is not read."""
        scale = self._scales.get(name)
        if scale is None:
            return self._plain.read_slice(name, index)
        codes = self._plain.read_slice(name, index)
        if codes.dim() == 1:
            return self.read_rows(name, index, index + 1)[0]
        return self._decode(name, codes, self._plain.read_slice(scale.name, index))

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the leading dimension; the rest of the tensor is not read."""
        scale = self._scales.get(name)
        if scale is None:
            return self._plain.read_rows(name, begin, end)
        codes = self._plain.read_rows(name, begin, end)
        if codes.dim() > 2:
            return torch.stack([self.read_slice(name, index) for index in range(begin, end)])
        rows = self._block.rows
        scales = self._plain.read_rows(scale.name, begin // rows, -(-end // rows))
        return self._decode(name, codes, scales, begin)

    def _decode(
        self, name: str, codes: torch.Tensor, scales: torch.Tensor, first_row: int = 0
    ) -> torch.Tensor:
        where = f"{self._plain.info(name).file}: tensor {name}"
        return decode_blocks(codes.view(torch.uint8), scales.to(torch.float32), self._block, where, first_row)

    def _scale_of(self, info: TensorInfo) -> TensorInfo | None:
        """The checked scales of an FP8 tensor; None for any other tensor."""
        if info.dtype != CODE_DTYPE:
            return None
        where = f"{info.file}: tensor {info.name!r:.200}"
        if len(info.shape) not in (2, 3) or not all(info.shape):
            raise CorruptFileError(f"{where}: {CODE_DTYPE} must be a matrix, got shape {list(info.shape)}")
        name = info.name + SCALE_SUFFIX
        if name not in self._plain:
            raise CorruptFileError(f"{where}: its scales, tensor {name!r:.200}, are missing")
        scale = self._plain.info(name)
        expected = self._block.scale_shape(info.shape)
        if scale.dtype not in SCALE_DTYPES or scale.shape != expected:
            kinds = " or ".join(SCALE_DTYPES)
            raise CorruptFileError(
                f"{scale.file}: tensor {name!r:.200}: expected {kinds} {list(expected)} for codes "
                f"{list(info.shape)}, got {scale.dtype} {list(scale.shape)}"
            )
        return scale


def decode_blocks(
    codes: torch.Tensor, scales: torch.Tensor, block: BlockFormat, where: str, first_row: int = 0
) -> torch.Tensor:
    """bf16 of code * scale.

    codes: [N, K] uint8; scales: [ceil((offset + N) / block.rows), ceil(K / block.columns)] float32, where
    offset = first_row % block.rows and first_row is the codes' place in the whole tensor. Raises
    CorruptFileError naming the element for a code or scale that is no finite number.
    """
    if not bool(torch.isfinite(scales).all()):
        at = torch.nonzero(~torch.isfinite(scales))[0].tolist()
        at[0] += first_row // block.rows
        raise CorruptFileError(f"{where}{SCALE_SUFFIX}: the scale at {at} is not a finite number")
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    sizes = (block.rows, block.columns, first_row % block.rows)
    arrays = (codes.contiguous().numpy(), scales.contiguous().numpy())
    if not _kernels.decode_fp8(*arrays, *sizes, out.view(torch.uint16).numpy()):
        _refuse_nan_codes(codes, where, first_row)
    return out


def _refuse_nan_codes(codes: torch.Tensor, where: str, first_row: int) -> None:
    is_nan = codes.bitwise_and(NAN_CODE).eq_(NAN_CODE)
    if bool(is_nan.any()):
        row, column = torch.nonzero(is_nan)[0].tolist()
        raise CorruptFileError(
            f"{where}: the weight at [{first_row + row}, {column}] is not a number (FP8 code NaN); "
            "the checkpoint is damaged, fetch it again"
        )
