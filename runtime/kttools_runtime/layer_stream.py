"""Layers built when they are asked for, one held at a time: models whose weights do not fit in RAM."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from .model import DecoderLayer


class LayerStream(Sequence["DecoderLayer"]):
    """Looks like the list of a model's layers. build(index) reads a layer's weights and packs them.

    Asking for another layer lets go of the one before it first, so a pass over many texts should take each
    layer for all of them before the next. A loop variable holds the old layer while the next is built: use an
    index. What is set on a layer (a table, say) is gone with it.
    """

    def __init__(self, build: Callable[[int], "DecoderLayer"], count: int) -> None:
        self._build = build
        self._count = count
        self._index = -1
        self._layer: DecoderLayer | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> "DecoderLayer": ...
    @overload
    def __getitem__(self, index: slice) -> "Sequence[DecoderLayer]": ...
    def __getitem__(self, index: int | slice) -> "DecoderLayer | Sequence[DecoderLayer]":
        if isinstance(index, slice):
            raise TypeError("layers are streamed one at a time; a slice would hold several")
        if not 0 <= index < self._count:
            raise IndexError(f"layer {index} of {self._count}")
        if self._layer is None or self._index != index:
            self._layer = None
            self._layer = self._build(index)
            self._index = index
        return self._layer

    def __iter__(self) -> "Iterator[DecoderLayer]":
        return (self[index] for index in range(self._count))
