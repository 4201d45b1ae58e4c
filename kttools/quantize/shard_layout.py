"""What stands in which shard, from shapes alone: tensor names, dtypes, byte offsets. See docs/shards.md."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from kttools.families import TensorSource
from kttools_runtime import strict_json
from kttools_runtime.block_formats import BLOCK_FORMATS, BLOCKS_PART
from kttools_runtime.safetensors_file import DTYPES, LENGTH_BYTES
from kttools_runtime.weights import check_sum_inputs

from .blocks import linear_format
from .recipe import Recipe
from .rules import KEPT_FORMAT

SHARD_BYTES = 4_000_000_000
HEADER_ALIGNMENT = 64
INDEX_NAME = "model.safetensors.index.json"
METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype][0]

    @property
    def bytes(self) -> int:
        return self.item_bytes * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ShardTensor:
    """A source tensor and what it becomes. format: None when it is stored as the source has it.

    group_size: of int4.
    """

    source: TensorSource
    format: str | None
    parts: tuple[StoredTensor, ...]
    group_size: int

    @property
    def base(self) -> str:
        return self.source.name.removesuffix(".weight")

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file: its bare name, its tensors in model order, and the bytes of its header."""

    name: str
    tensors: tuple[ShardTensor, ...]
    header: bytes
    offsets: dict[str, int]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(tensor.bytes for tensor in self.tensors)


def shard_tensor(source: TensorSource, recipe: Recipe) -> ShardTensor:
    """The parts a source tensor is stored as. Raises InvalidInputError for one too wide for its format."""
    format_name = recipe.shard_format(source.name, source.role, source.shape)
    if format_name == KEPT_FORMAT:
        format_name = linear_format(source, recipe.is_ruled(source.name))
    base = source.name.removesuffix(".weight")
    if format_name is None:
        return ShardTensor(source, None, (StoredTensor(source.name, source.dtype, source.shape),), 0)
    check_sum_inputs(source.name, format_name, source.shape[-1])
    group_size = recipe.shard_group_size(source.name)
    parts = _parts(format_name, source.shape, group_size)
    stored = tuple(StoredTensor(f"{base}.{suffix}", dtype, shape) for suffix, dtype, shape in parts)
    return ShardTensor(source, format_name, stored, group_size)


def _parts(
    format_name: str, shape: tuple[int, ...], group_size: int
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """(suffix, dtype, shape) of each part of a linear [N, K], in the order the quantisers return them."""
    rows, columns = shape
    if format_name == "bf16":
        return (("weight", "BF16", shape),)
    if format_name == "int8":
        return ("qweight", "I8", shape), ("row_scale", "F32", (rows,))
    if format_name in BLOCK_FORMATS:
        return ((BLOCKS_PART, "U8", (rows, BLOCK_FORMATS[format_name].row_bytes(columns) or 0)),)
    groups = -(-columns // group_size)
    return (
        ("qweight", "U8", (rows, groups * group_size // 2)),
        ("group_scale", "U8", (rows, groups)),
        ("group_zero", "U8", (rows, groups)),
        ("row_scale", "F32", (rows,)),
    )


def shard_files(tensors: Iterable[ShardTensor], shard_bytes: int = SHARD_BYTES) -> tuple[ShardFile, ...]:
    """Tensors in model order into files of at most shard_bytes (one tensor alone may be larger)."""
    groups: list[list[ShardTensor]] = []
    filled = 0
    for tensor in tensors:
        if not groups or filled + tensor.bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.bytes
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return tuple(_shard_file(name, tuple(group)) for name, group in zip(names, groups, strict=True))


def _shard_file(name: str, tensors: tuple[ShardTensor, ...]) -> ShardFile:
    """Wide elements first, so that every tensor is aligned to its own element size without any hole."""
    parts = sorted((part for tensor in tensors for part in tensor.parts), key=lambda part: -part.item_bytes)
    entries: dict[str, object] = {"__metadata__": METADATA}
    offsets, position = {}, 0
    for part in parts:
        end = position + part.bytes
        entries[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [position, end]}
        offsets[part.name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-(LENGTH_BYTES + len(text)) % HEADER_ALIGNMENT)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return ShardFile(name, tensors, header, {key: len(header) + at for key, at in offsets.items()})


def index_bytes(shards: Iterable[ShardFile]) -> bytes:
    """model.safetensors.index.json: total size and the file of every tensor."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        for tensor in shard.tensors:
            weight_map |= {part.name: shard.name for part in tensor.parts}
            total += tensor.bytes
    return strict_json.canonical({"metadata": {"total_size": total}, "weight_map": weight_map})
