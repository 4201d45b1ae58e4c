"""ggml's tensor types: block geometry, and bytes to numbers.

The table is ours, so that sizes are checked before anything else looks at the bytes; the numbers come from
csrc/dequantize*.cpp or, for types that are rarely met, the gguf package's NumPy code, which are called only
with bytes whose count follows from type and shape.
"""

from dataclasses import dataclass
from functools import cache

import gguf
import numpy as np
import torch

from kttools_runtime import _kernels
from kttools_runtime.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class GgmlType:
    """block: weights that are stored together; bytes: of one block; dtype: of a read, None: not readable."""

    number: int
    name: str
    block: int
    bytes: int
    dtype: str | None = "F32"

    def row_bytes(self, columns: int) -> int | None:
        """Bytes of a row; None when the columns do not fill whole blocks."""
        return None if columns % self.block else columns // self.block * self.bytes


# fmt: off
TYPES: dict[int, GgmlType] = {
    entry.number: entry
    for entry in (
        GgmlType(0, "F32", 1, 4), GgmlType(1, "F16", 1, 2, "F16"), GgmlType(30, "BF16", 1, 2, "BF16"),
        GgmlType(2, "Q4_0", 32, 18), GgmlType(3, "Q4_1", 32, 20), GgmlType(6, "Q5_0", 32, 22),
        GgmlType(7, "Q5_1", 32, 24), GgmlType(8, "Q8_0", 32, 34), GgmlType(9, "Q8_1", 32, 40, None),
        GgmlType(10, "Q2_K", 256, 84), GgmlType(11, "Q3_K", 256, 110), GgmlType(12, "Q4_K", 256, 144),
        GgmlType(13, "Q5_K", 256, 176), GgmlType(14, "Q6_K", 256, 210), GgmlType(15, "Q8_K", 256, 292, None),
        GgmlType(16, "IQ2_XXS", 256, 66), GgmlType(17, "IQ2_XS", 256, 74), GgmlType(18, "IQ3_XXS", 256, 98),
        GgmlType(19, "IQ1_S", 256, 50), GgmlType(20, "IQ4_NL", 32, 18), GgmlType(21, "IQ3_S", 256, 110),
        GgmlType(22, "IQ2_S", 256, 82), GgmlType(23, "IQ4_XS", 256, 136), GgmlType(29, "IQ1_M", 256, 56),
        GgmlType(40, "NVFP4", 64, 36),
        GgmlType(34, "TQ1_0", 256, 54), GgmlType(35, "TQ2_0", 256, 66), GgmlType(39, "MXFP4", 32, 17),
        GgmlType(24, "I8", 1, 1, None), GgmlType(25, "I16", 1, 2, None), GgmlType(26, "I32", 1, 4, None),
        GgmlType(27, "I64", 1, 8, None), GgmlType(28, "F64", 1, 8, None),
    )
}
# fmt: on
BY_NAME = {entry.name: entry for entry in TYPES.values()}
PLAIN: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def decode(data: np.ndarray, kind: GgmlType, columns: int) -> torch.Tensor:
    """[rows, columns] in the type's read dtype. data: uint8, whole rows, writable."""
    rows = data.reshape(-1, kind.row_bytes(columns) or 1)
    if kind.name in PLAIN:
        return torch.from_numpy(rows).view(PLAIN[kind.name])
    if not len(rows):  # the package's reshapes cannot infer a dimension of nothing
        return torch.empty((0, columns), dtype=torch.float32)
    if kind.name in _kernels.GGML_TYPES:
        return torch.from_numpy(_kernels.decode_ggml(kind.name, rows.reshape(-1))).view(-1, columns)
    if kind.name in _kernels.GGML_CODEBOOKS:
        values = _kernels.decode_codebook(kind.name, rows.reshape(-1), grid_of(kind))
        return torch.from_numpy(values).view(-1, columns)
    try:
        qtype = gguf.GGMLQuantizationType(kind.number)
    except ValueError:
        raise InvalidInputError(
            f"type {kind.name} is newer than the installed gguf package; update it"
        ) from None
    with np.errstate(all="ignore"):  # a scale may be anything; what is not finite is refused by its index
        values = gguf.quants.dequantize(rows, qtype)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(-1, columns)


@cache
def grid_of(kind: GgmlType) -> np.ndarray:
    """int8 [rows, columns]: the vectors an i-quant's indices stand for, a constant of the format."""
    quant = gguf.quants._type_traits[gguf.GGMLQuantizationType(kind.number)]
    quant.init_grid()
    assert quant.grid is not None
    return np.ascontiguousarray(quant.grid[0, 0], dtype=np.int8)


def encode(values: np.ndarray, kind: GgmlType) -> np.ndarray:
    """uint8 rows of float32 rows. Raises NotImplementedError for a type the gguf package cannot write."""
    rows = np.ascontiguousarray(values, dtype=np.float32)
    return np.asarray(gguf.quants.quantize(rows, gguf.GGMLQuantizationType(kind.number))).view(np.uint8)
