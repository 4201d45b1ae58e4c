"""Hub tensors as they lie in GGUF: whole, in parts to be joined, or with rows in another order."""

import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kttools_runtime.errors import CorruptFileError, InvalidInputError

from .header import GgufTensor
from .types import decode


class View(Protocol):
    """One hub tensor. shape: the hub's; dtype: of what rows() gives."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def parts(self) -> tuple[GgufTensor, ...]:
        """The file's tensors it is made of."""
        ...

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the leading dimension in fresh memory."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor stored as the hub has it, perhaps with other dimensions of size one."""

    tensor: GgufTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def parts(self) -> tuple[GgufTensor, ...]:
        return (self.tensor,)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return read_rows(self.tensor, begin, end)


@dataclass(frozen=True, slots=True)
class OneRow:
    """A vector that the hub has as a matrix of one row."""

    tensor: GgufTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, self.tensor.shape[-1]

    @property
    def parts(self) -> tuple[GgufTensor, ...]:
        return (self.tensor,)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return read_matrix(self.tensor, begin, end)


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Rows of each head with the two halves of the rotary pairs as neighbours; the hub has them apart."""

    tensor: GgufTensor
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def parts(self) -> tuple[GgufTensor, ...]:
        return (self.tensor,)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return read_rows(self.tensor, 0, self.shape[0])[self._stored_rows(begin, end)]

    def raw_rows(self, begin: int, end: int) -> np.ndarray:
        """uint8 [end - begin, bytes of a row]: the stored bytes of rows of a matrix."""
        data = read_bytes(self.tensor, 0, self.shape[0]).reshape(self.shape[0], -1)
        return data[self._stored_rows(begin, end).numpy()]

    def _stored_rows(self, begin: int, end: int) -> torch.Tensor:
        """Where the file has rows [begin, end)."""
        places = torch.arange(self.shape[0]).view(self.heads, self.shape[0] // self.heads // 2, 2)
        return places.transpose(1, 2).reshape(-1)[begin:end]


@dataclass(frozen=True, slots=True)
class JoinedKvB:
    """kv_b_proj [heads * (nope + value), rank], of k_b [heads, rank, nope] and v_b [heads, value, rank].

    Either may be stored with the first two dimensions as one. Raises InvalidInputError when they do not fit.
    """

    key: GgufTensor
    value: GgufTensor
    heads: int

    def __post_init__(self) -> None:
        rank = self.value.shape[-1]
        is_even = self.heads > 0 and all(_rows(part) % self.heads == 0 for part in self.parts)
        if not is_even or _rows(self.key) != self.heads * rank:
            got = f"{list(self.key.shape)} and {list(self.value.shape)}"
            raise InvalidInputError(
                f"{self.key.file}: tensors {self.key.name} and {self.value.name}: shapes {got} do not fit "
                f"each other and {self.heads} heads"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.heads * (self.key.shape[-1] + self._values), self.value.shape[-1]

    @property
    def _values(self) -> int:
        return _rows(self.value) // self.heads

    @property
    def parts(self) -> tuple[GgufTensor, ...]:
        return self.key, self.value

    def rows(self, begin: int, end: int) -> torch.Tensor:
        rank, nope, values = self.value.shape[-1], self.key.shape[-1], self._values
        each = nope + values
        first, last = begin // each, -(-end // each)
        key = read_matrix(self.key, first * rank, last * rank).view(-1, rank, nope).transpose(1, 2)
        value = read_matrix(self.value, first * values, last * values).view(-1, values, rank)
        wide = torch.promote_types(key.dtype, value.dtype)
        joined = torch.cat([key.to(wide), value.to(wide)], dim=1).view(-1, rank)
        return joined[begin - first * each : end - first * each].clone()


def read_rows(tensor: GgufTensor, begin: int, end: int) -> torch.Tensor:
    """Rows [begin, end) of the leading dimension, decoded."""
    if not 0 <= begin <= end <= tensor.shape[0]:
        raise IndexError(f"tensor {tensor.name} of shape {list(tensor.shape)} has no rows {begin}..{end}")
    if len(tensor.shape) == 1:
        return read_matrix(tensor, 0, 1).view(-1)[begin:end].clone()
    each = _rows(tensor) // tensor.shape[0]
    return read_matrix(tensor, begin * each, end * each).view(end - begin, *tensor.shape[1:])


def read_matrix(tensor: GgufTensor, begin: int, end: int) -> torch.Tensor:
    """[end - begin, columns]: rows of the tensor taken as one matrix of its fastest dimension, decoded."""
    columns = tensor.shape[-1]
    if tensor.kind.dtype is None:
        raise InvalidInputError(
            f"{tensor.file}: tensor {tensor.name}: type {tensor.kind.name} cannot be read"
        )
    return decode(read_bytes(tensor, begin, end), tensor.kind, columns)


def read_bytes(tensor: GgufTensor, begin: int, end: int) -> np.ndarray:
    """uint8: the stored bytes of rows [begin, end) of the tensor taken as one matrix."""
    row_bytes = tensor.bytes // _rows(tensor)
    data = np.empty((end - begin) * row_bytes, dtype=np.uint8)
    view, offset = data.data, tensor.offset + begin * row_bytes
    try:
        descriptor = os.open(tensor.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            while view:
                count = os.preadv(descriptor, [view], offset)
                if count == 0:
                    raise CorruptFileError(f"{tensor.file}: tensor {tensor.name}: truncated at byte {offset}")
                view, offset = view[count:], offset + count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InvalidInputError(f"{tensor.file}: cannot be read: {error.strerror}") from None
    return data


def _rows(tensor: GgufTensor) -> int:
    """Rows of the tensor taken as one matrix of its fastest dimension."""
    total = 1
    for size in tensor.shape[:-1]:
        total *= size
    return total
