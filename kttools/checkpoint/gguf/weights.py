"""A GGUF model's tensors under the hub's names: what kttools.families asks any checkpoint for."""

from pathlib import Path

import numpy as np
import torch

from kttools.checkpoint.base import DecodedInfo, Info, Stored
from kttools_runtime.errors import InvalidInputError

from .architectures import Architecture, Transform
from .header import GgufTensor
from .splits import GgufFiles
from .types import GgmlType
from .views import Interleaved, JoinedKvB, OneRow, View, Whole, read_bytes

KEY_PART, VALUE_PART, JOINT = "attn_k_b.weight", "attn_v_b.weight", "attn_kv_b.weight"
KV_B_HUB = "model.layers.{layer}.self_attn.kv_b_proj.weight"


class GgufWeights:
    """Tensors by hub name; those the architecture's table lacks keep their own, to be refused by name.

    Thread-safe and picklable: a file is open only during a read.
    """

    def __init__(self, files: GgufFiles, architecture: Architecture) -> None:
        self._files = files.files
        self._views: dict[str, View] = {}
        self._heads = files.metadata.integer(f"{architecture.name}.attention.head_count", None)
        self._key_heads = files.metadata.integer(f"{architecture.name}.attention.head_count_kv", self._heads)
        left = dict(files.tensors)
        self.notices = self._join_kv_b(left)
        for tensor in left.values():
            self._add(tensor, architecture)

    @property
    def files(self) -> tuple[Path, ...]:
        return self._files

    @property
    def index_file(self) -> Path | None:
        return None

    def names(self) -> list[str]:
        return list(self._views)

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def __len__(self) -> int:
        return len(self._views)

    def info(self, name: str) -> Info:
        """Raises InvalidInputError for a name the file does not have."""
        view = self._view(name)
        dtypes = {part.kind.dtype or part.kind.name for part in view.parts}
        dtype = next(iter(dtypes)) if len(dtypes) == 1 else "F32"
        return DecodedInfo(name, dtype, view.shape, view.parts[0].file)

    def stored(self, name: str) -> Stored:
        parts = self._view(name).parts
        kinds = dict.fromkeys(part.kind.name for part in parts)
        return Stored(" + ".join(kinds), sum(part.bytes for part in parts))

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in fresh memory."""
        view = self._view(name)
        return view.rows(0, view.shape[0])

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        """Slice [index] of the leading dimension; the rest of the tensor is not read."""
        return self.read_rows(name, index, index + 1)[0]

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the leading dimension; the rest is not read where the layout allows it."""
        view = self._view(name)
        if not 0 <= begin <= end <= view.shape[0]:
            raise IndexError(f"tensor {name} of shape {list(view.shape)} has no rows {begin}..{end}")
        return view.rows(begin, end)

    def raw_slice(self, name: str, index: int) -> tuple[GgmlType, np.ndarray]:
        """(type, bytes) of slice [index] of the leading dimension as the file has them, undecoded.

        Raises InvalidInputError for a tensor that is not stored as the hub has it.
        """
        view = self._view(name)
        if not isinstance(view, Whole):
            raise InvalidInputError(f"{view.parts[0].file}: tensor {name} is stored in another layout")
        tensor = view.tensor
        if not 0 <= index < tensor.shape[0]:
            raise IndexError(f"tensor {name} of shape {list(tensor.shape)} has no slice {index}")
        each = tensor.shape[1] if len(tensor.shape) > 2 else 1
        return tensor.kind, read_bytes(tensor, index * each, (index + 1) * each)

    def raw_rows(self, name: str) -> tuple[GgmlType, np.ndarray]:
        """(type, bytes) of a whole tensor as the file has it. Raises as raw_slice."""
        view = self._view(name)
        if not isinstance(view, Whole):
            raise InvalidInputError(f"{view.parts[0].file}: tensor {name} is stored in another layout")
        rows = view.tensor.shape[0] * (view.tensor.shape[1] if len(view.tensor.shape) > 2 else 1)
        return view.tensor.kind, read_bytes(view.tensor, 0, rows)

    def matrix_kind(self, name: str) -> GgmlType | None:
        """The type of a matrix whose rows the file has, perhaps in another order than the hub; else None."""
        view = self._view(name)
        if not isinstance(view, (Whole, Interleaved)) or len(view.tensor.shape) != 2:
            return None
        return view.tensor.kind

    def raw_matrix(self, name: str, begin: int, end: int) -> np.ndarray:
        """uint8 [end - begin, bytes of a row]: rows of a matrix that has a matrix_kind, undecoded."""
        view = self._view(name)
        if isinstance(view, Interleaved):
            return view.raw_rows(begin, end)
        if not isinstance(view, Whole):
            raise InvalidInputError(f"{view.parts[0].file}: tensor {name} is stored in another layout")
        return read_bytes(view.tensor, begin, end).reshape(end - begin, -1)

    def _view(self, name: str) -> View:
        try:
            return self._views[name]
        except KeyError:
            raise InvalidInputError(f"{self._files[0]}: no tensor {name}") from None

    def _add(self, tensor: GgufTensor, architecture: Architecture) -> None:
        name, transform = architecture.hub_name(tensor.name) or (tensor.name, Transform.NONE)
        if name in self._views:
            raise InvalidInputError(f"{tensor.file}: tensor {tensor.name} is a second {name}")
        heads = {Transform.QUERY_HALVES: self._heads, Transform.KEY_HALVES: self._key_heads}.get(transform)
        if transform is Transform.NONE:
            self._views[name] = Whole(tensor)
            return
        if transform is Transform.ONE_ROW and tensor.shape in ((tensor.shape[-1],), (1, tensor.shape[-1])):
            self._views[name] = OneRow(tensor)
            return
        if not heads or heads < 1 or tensor.shape[0] % (2 * heads):
            got = f"{list(tensor.shape)} and {heads} heads"
            raise InvalidInputError(f"{tensor.file}: tensor {tensor.name}: rows do not fit: {got}")
        self._views[name] = Interleaved(tensor, heads)

    def _join_kv_b(self, left: dict[str, GgufTensor]) -> list[str]:
        """Takes attn_k_b and attn_v_b out of `left`: joined, or put aside where attn_kv_b is there too."""
        aside = 0
        for name in [name for name in left if name.endswith("." + KEY_PART)]:
            prefix = name.removesuffix(KEY_PART)
            if prefix + VALUE_PART not in left:
                raise InvalidInputError(f"{left[name].file}: tensor {name} without {prefix + VALUE_PART}")
            key, value = left.pop(name), left.pop(prefix + VALUE_PART)
            if prefix + JOINT in left:
                aside += 2
                continue
            layer = prefix.removeprefix("blk.").rstrip(".")
            self._views[KV_B_HUB.format(layer=layer)] = JoinedKvB(key, value, self._heads or 0)
        reason = "left out: attn_k_b and attn_v_b, the file also has attn_kv_b"
        return [f"{reason} ({aside} tensors)"] if aside else []
