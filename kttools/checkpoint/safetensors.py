"""A safetensors checkpoint: one file, or shards with an index. Names, shapes and single tensors, read lazily.

The index is as hostile as the headers: bare file names only, and it must agree with what the shards hold,
tensor by tensor. Shard file names are taken from the index as they are (both five and six digits after "of"
occur).
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kttools_runtime import strict_json
from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.safetensors_file import TensorInfo, read_header, read_tensor

from .base import Stored

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class Checkpoint:
    """The tensors of a checkpoint by name. Thread-safe and picklable: a file is open only during a read."""

    def __init__(
        self, tensors: dict[str, TensorInfo], files: Iterable[Path], index_file: Path | None
    ) -> None:
        self._tensors = tensors
        self.files = tuple(sorted(files))
        self.index_file = index_file

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Opens a directory, a .safetensors file or an index; reads and checks every header.

        Raises InvalidInputError (missing files, no safetensors) or CorruptFileError (a rule is broken).
        """
        found = _locate(Path(path))
        if found.name.endswith(".json"):
            return _open_index(found)
        return cls(read_header(found).tensors, [found], None)

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Raises InvalidInputError for a name the checkpoint does not have."""
        try:
            return self._tensors[name]
        except KeyError:
            where = self.index_file or self.files[0]
            raise InvalidInputError(f"{where}: no tensor {name}") from None

    def stored(self, name: str) -> Stored:
        info = self.info(name)
        return Stored(info.dtype, info.bytes)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in fresh memory."""
        return read_tensor(self.info(name))

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        """Slice [index] of the leading dimension; the rest of the tensor is not read."""
        return read_tensor(self.info(name), index)

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the leading dimension; the rest of the tensor is not read."""
        info = self.info(name)
        if not info.shape or not 0 <= begin <= end <= info.shape[0]:
            raise IndexError(f"tensor {name} of shape {list(info.shape)} has no rows {begin}..{end}")
        row_bytes = info.bytes // max(info.shape[0], 1)
        shape = (end - begin, *info.shape[1:])
        part = replace(info, shape=shape, offset=info.offset + begin * row_bytes, bytes=shape[0] * row_bytes)
        return read_tensor(part)


def _locate(path: Path) -> Path:
    """The index or the single file that `path` means."""
    if path.is_file():
        if path.name.endswith((".safetensors", ".index.json")):
            return path
        raise InvalidInputError(f"{path}: expected a directory, a .safetensors file or its .index.json")
    if not path.is_dir():
        raise InvalidInputError(f"{path}: no such file or directory")
    index, single = path / INDEX_NAME, path / SINGLE_NAME
    if index.exists() and single.exists():
        raise InvalidInputError(f"{path}: has both {SINGLE_NAME} and {INDEX_NAME}; name one of them")
    if index.exists():
        return index
    return _only_safetensors(path)


def _only_safetensors(directory: Path) -> Path:
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise InvalidInputError(
            f"{directory}: {len(files)} safetensors files but no {INDEX_NAME}; fetch it too"
        )
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise InvalidInputError(f"{directory}: no safetensors files; pickles (.bin, .pt) are never read")
    raise InvalidInputError(f"{directory}: no safetensors files")


def _open_index(index_file: Path) -> Checkpoint:
    weight_map = _weight_map(index_file)
    by_shard: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        by_shard.setdefault(shard, set()).add(name)
    missing = sorted(shard for shard in by_shard if not (index_file.parent / shard).is_file())
    if missing:
        got = f"{len(missing)} of {len(by_shard)} shards missing, first {missing[0]}"
        raise InvalidInputError(f"{index_file}: {got}; fetch the checkpoint again")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(by_shard):
        file = index_file.parent / shard
        held = read_header(file).tensors
        _check_agreement(index_file, file, by_shard[shard], held, weight_map)
        tensors.update(held)
    return Checkpoint(tensors, [index_file.parent / shard for shard in by_shard], index_file)


def _weight_map(index_file: Path) -> dict[str, str]:
    index = strict_json.read_object(index_file)
    weight_map: Any = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{index_file}: weight_map must be an object that names at least one tensor")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_bare_name(shard):
            problem = f"must be a bare .safetensors file name, got {shard!r:.200}"
            raise CorruptFileError(f"{index_file}: weight_map[{name[:200]!r}] {problem}")
    return weight_map


def _is_bare_name(text: str) -> bool:
    is_plain = text.isprintable() and "/" not in text and "\\" not in text
    return is_plain and text.endswith(".safetensors") and not text.startswith(".") and len(text) <= 255


def _check_agreement(
    index_file: Path, file: Path, expected: set[str], held: dict[str, TensorInfo], weight_map: dict[str, str]
) -> None:
    for name in sorted(expected - held.keys()):
        raise CorruptFileError(f"{index_file}: tensor {name[:200]!r} is not in {file.name} as the index says")
    for name in sorted(held.keys() - expected):
        assigned = f"assigned to {weight_map[name]}" if name in weight_map else "not in the index"
        raise CorruptFileError(f"{file}: holds tensor {name[:200]!r}, {assigned} ({index_file.name})")
