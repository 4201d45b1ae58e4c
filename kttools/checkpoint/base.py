"""What every checkpoint reader offers, whatever its files: names, shapes and single tensors, read lazily.

A tensor has two descriptions. `info` is what a read delivers (bf16, f16 or f32 under the family's names);
`stored` is what the files hold, which may be smaller (FP8 with scales, a ggml type).
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from kttools_runtime.safetensors_file import DTYPES, TensorInfo


@dataclass(frozen=True, slots=True)
class DecodedInfo:
    """A tensor that is decoded while it is read. file: the (first) file it comes from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def bytes(self) -> int:
        """Bytes as delivered."""
        return math.prod(self.shape) * DTYPES[self.dtype][0]


Info = TensorInfo | DecodedInfo


@dataclass(frozen=True, slots=True)
class Stored:
    """What the files hold for a tensor. dtype: their own word, such as F8_E4M3 or Q4_K; scales included."""

    dtype: str
    bytes: int


class Weights(Protocol):
    """A checkpoint's tensors by name. Thread-safe and picklable: a file is open only during a read."""

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def index_file(self) -> Path | None: ...

    def names(self) -> list[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def __len__(self) -> int: ...

    def info(self, name: str) -> Info:
        """Raises InvalidInputError for a name the checkpoint does not have."""
        ...

    def stored(self, name: str) -> Stored: ...

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in fresh memory."""
        ...

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        """Slice [index] of the leading dimension; the rest of the tensor is not read."""
        ...

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the leading dimension; the rest is not read where the format allows it."""
        ...


Plain = TypeVar("Plain", bound=Weights)


class WeightsView(Generic[Plain]):
    """The files of another checkpoint under other names: what is the same for every way to read them.

    A subclass sets `_names`, all that it offers, before it is used.
    """

    _names: Collection[str]

    def __init__(self, plain: Plain) -> None:
        self._plain = plain

    @property
    def files(self) -> tuple[Path, ...]:
        return self._plain.files

    @property
    def index_file(self) -> Path | None:
        return self._plain.index_file

    def names(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)
