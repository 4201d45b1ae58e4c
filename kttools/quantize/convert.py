"""One piece of work: an expert into a pack, or rows of a tensor into a shard; and the error of that."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from kttools.families import Role, SourceModel
from kttools_runtime import _kernels
from kttools_runtime.block_formats import BLOCK_FORMATS
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.experts import as_numpy
from kttools_runtime.pack_writer import PackWriter

from .blocks import linear_rows, pack_blocks, read_blocks
from .plan import ROWS_BYTES, PackPlan
from .report import BLOCK_ELEMENTS, ErrorSums, TensorError, as_float32, error_sums, expert_errors
from .shard_layout import ShardTensor
from .shard_writer import ShardWriter

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def convert_expert(source: SourceModel, pack: PackPlan, expert: int, writer: PackWriter) -> list[TensorError]:
    """Reads, packs and writes one expert; the errors of gate, up and down, from the blob that was written.

    Raises InvalidInputError naming the tensor for a weight that is not finite or does not fit the format.
    """
    if pack.formats[expert] in _kernels.BLOCK_FORMATS:
        return _keep_expert(source, pack, expert, writer)
    arrays = [kernel_array(tensor) for tensor in source.read_expert(pack.layer, expert)]
    names = _names(pack, expert)
    format_name = pack.formats[expert]
    blob = np.empty(pack.header.experts[expert].bytes, dtype=np.uint8)
    try:
        gate, up, down = arrays
        _kernels.pack_expert(format_name, gate, up, down, blob)
    except ValueError as error:
        _raise_for_weights(source, zip(names, arrays, strict=True), error)
    writer.write(expert, blob)
    errors = []
    for name, array, sums in zip(names, arrays, expert_errors(format_name, arrays, blob), strict=True):
        checked = checked_sums(sums, source, name, format_name)
        errors.append(TensorError.of(name, Role.EXPERT.value, format_name, array.shape, checked))
    return errors


def _names(pack: PackPlan, expert: int) -> list[str]:
    return [f"model.layers.{pack.layer}.mlp.experts.{expert}.{name}.weight" for name in PROJECTIONS]


def _keep_expert(source: SourceModel, pack: PackPlan, expert: int, writer: PackWriter) -> list[TensorError]:
    """convert_expert of blocks that stay as they are: the errors are zero, which is proved, not assumed."""
    blocks = read_blocks(source, pack.layer, expert)
    config = source.config
    blob = np.empty(pack.header.experts[expert].bytes, dtype=np.uint8)
    try:
        pack_blocks(blocks, pack.formats[expert], config.hidden_size, config.moe_intermediate_size, blob)
    except ValueError as error:
        raise InvalidInputError(
            f"{source.path}: layer {pack.layer}, expert {expert}: {error}; the checkpoint is damaged, "
            "fetch it again"
        ) from error
    writer.write(expert, blob)
    into = config.moe_intermediate_size, config.hidden_size
    named = zip(_names(pack, expert), blocks, (into, into, into[::-1]), strict=True)
    return [TensorError.of(n, Role.EXPERT.value, b.format, shape, ErrorSums()) for n, b, shape in named]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [begin, end) of a tensor of a shard."""

    tensor: ShardTensor
    begin: int
    end: int

    @property
    def source_bytes(self) -> int:
        return self.tensor.source.bytes // self.tensor.source.shape[0] * (self.end - self.begin)


def split_rows(tensor: ShardTensor) -> list[Rows]:
    """The tensor in blocks of about ROWS_BYTES; a vector is one row per element."""
    count = tensor.source.shape[0]
    step = max(1, ROWS_BYTES * count // max(tensor.source.bytes, 1))
    return [Rows(tensor, begin, min(begin + step, count)) for begin in range(0, count, step)]


def convert_rows(source: SourceModel, rows: Rows, group_size: int, writer: ShardWriter) -> ErrorSums:
    """Reads, quantises and writes some rows. Raises InvalidInputError as convert_expert does."""
    tensor = rows.tensor
    if tensor.format in BLOCK_FORMATS:
        blocks = linear_rows(tensor.source, rows.begin, rows.end)
        writer.write(tensor.parts[0], rows.begin, blocks)
        return ErrorSums()
    array = kernel_array(tensor.source.read_rows(rows.begin, rows.end), keep_f16=tensor.format is None)
    name = tensor.source.name
    try:
        parts, stored = _STORE[tensor.format](array, group_size)
    except ValueError as error:
        _raise_for_weights(source, [(name, array)], error, rows.begin)
    for part, values in zip(tensor.parts, parts, strict=True):
        writer.write(part, rows.begin, values)
    if tensor.format is None:
        bad = first_not_finite(array)
        if bad:
            _raise_not_finite(source, name, (bad[0] + rows.begin, *bad[1:]))
        return ErrorSums()
    return checked_sums(error_sums(array, stored), source, name, tensor.format, rows.begin, array)


def kernel_array(tensor: torch.Tensor, keep_f16: bool = False) -> np.ndarray:
    """What the kernels take: float32, or bf16 as uint16; F16 becomes float32, exactly."""
    if tensor.dtype == torch.float16 and not keep_f16:
        return tensor.numpy().astype(np.float32)
    return as_numpy(tensor)


def first_not_finite(array: np.ndarray) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity, or None."""
    flat = array.reshape(-1)
    for begin in range(0, flat.size, BLOCK_ELEMENTS):
        wrong = ~np.isfinite(as_float32(flat[begin : begin + BLOCK_ELEMENTS]))
        if wrong.any():
            found = np.unravel_index(begin + int(wrong.argmax()), array.shape)
            return tuple(int(index) for index in found)
    return None


def checked_sums(
    sums: ErrorSums,
    source: SourceModel,
    name: str,
    format_name: str,
    first_row: int = 0,
    array: np.ndarray | None = None,
) -> ErrorSums:
    """The sums, or InvalidInputError when a weight is not finite or overflows its format."""
    if sums.is_finite:
        return sums
    bad = first_not_finite(array) if array is not None else None
    if bad:
        _raise_not_finite(source, name, (bad[0] + first_row, *bad[1:]))
    raise InvalidInputError(f"{source.path}: tensor {name}: a weight is too large for {format_name}")


Stored = tuple[tuple[np.ndarray, ...], np.ndarray]


def _as_source(array: np.ndarray, _: int) -> Stored:
    return (array,), array


def _store_bf16(array: np.ndarray, _: int) -> Stored:
    bits = array
    if array.dtype != np.uint16:
        bits = as_numpy(torch.from_numpy(array).to(torch.bfloat16))
    return (bits,), bits


def _store_int8(array: np.ndarray, _: int) -> Stored:
    codes, row_scale = _kernels.quantize_int8(array)
    return (codes, row_scale), codes.astype(np.float32) * row_scale[:, None]


def _store_int4(array: np.ndarray, group_size: int) -> Stored:
    parts = _kernels.quantize_int4(array, group_size)
    return tuple(parts), _kernels.dequantize_int4(*parts, array.shape[1], group_size)


_STORE: dict[str | None, Callable[[np.ndarray, int], Stored]] = {
    None: _as_source,
    "bf16": _store_bf16,
    "int8": _store_int8,
    "int4": _store_int4,
}


def _raise_for_weights(
    source: SourceModel, named: Iterable[tuple[str, np.ndarray]], error: ValueError, first_row: int = 0
) -> None:
    """The kernels' refusal as an InvalidInputError that names the tensor."""
    name = ""
    for name, array in named:
        bad = first_not_finite(array)
        if bad:
            _raise_not_finite(source, name, (bad[0] + first_row, *bad[1:]))
    raise InvalidInputError(f"{source.path}: tensor {name}: {error}") from error


def _raise_not_finite(source: SourceModel, name: str, index: tuple[int, ...]) -> None:
    raise InvalidInputError(
        f"{source.path}: tensor {name}: the weight at {list(index)} is not a finite number; "
        "the checkpoint is damaged, fetch it again"
    )
