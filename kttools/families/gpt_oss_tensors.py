"""gpt-oss's expert tensors as other families have them: gate and up apart, rows by output.

Its checkpoints hold gate and up as one tensor with alternating outputs: in MXFP4 `gate_up_proj_blocks` and
`gate_up_proj_scales` (outputs are rows), in BF16 `gate_up_proj` (outputs are columns, as in transformers).
The tables know `gate_proj`, `up_proj`, `down_proj` [experts, outputs, inputs] and their `_bias` [experts,
outputs].
"""

from dataclasses import dataclass

import torch

from kttools.checkpoint.base import DecodedInfo, Info, Stored, Weights, WeightsView
from kttools.checkpoint.mxfp4 import check_pair, decode_mxfp4
from kttools_runtime.errors import CorruptFileError

FUSED = "gate_up_proj"
# What becomes of an output of the fused tensor: name and first row, of every second one.
HALVES = {"gate_proj": 0, "up_proj": 1}
BLOCKS, SCALES, BIAS = "_blocks", "_scales", "_bias"


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the tables: `source`, of which every `step`-th output from `first` on is taken."""

    source: str
    first: int
    step: int
    is_mxfp4: bool
    is_transposed: bool


class GptOssWeights(WeightsView[Weights]):
    """A safetensors checkpoint under the names of the tables; what is no expert's keeps its own name."""

    def __init__(self, plain: Weights) -> None:
        super().__init__(plain)
        self._parts: dict[str, _Part] = {}
        self._names = self._parts
        names = set(plain.names())
        for name in names:
            self._add(name)
        for name in names:
            if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS not in names:
                raise CorruptFileError(f"{plain.info(name).file}: tensor {name!r:.200} has no blocks")

    def info(self, name: str) -> Info:
        """Raises InvalidInputError for a name the checkpoint does not have."""
        part = self._parts.get(name)
        if part is None or (part.step == 1 and not part.is_mxfp4 and not part.is_transposed):
            return self._plain.info(name)
        info = self._plain.info(part.source)
        shape = self._pair_shape(part.source) if part.is_mxfp4 else info.shape
        if part.is_transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        outputs = 1 if name.endswith(BIAS) else len(shape) - 2
        halved = tuple(size // part.step if axis == outputs else size for axis, size in enumerate(shape))
        return DecodedInfo(name, "BF16" if part.is_mxfp4 else info.dtype, halved, info.file)

    def stored(self, name: str) -> Stored:
        part = self._parts[name]
        held = self._plain.stored(part.source)
        if not part.is_mxfp4:
            return Stored(held.dtype, held.bytes // part.step)
        scales = self._plain.stored(part.source.removesuffix(BLOCKS) + SCALES)
        return Stored("MXFP4", (held.bytes + scales.bytes) // part.step)

    def read(self, name: str) -> torch.Tensor:
        return self.read_rows(name, 0, self.info(name).shape[0])

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        """Slice [index] of the leading dimension; the rest of the tensor is not read."""
        return self.read_rows(name, index, index + 1)[0]

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Slices [begin, end) of the leading dimension, which for an expert tensor are experts."""
        part = self._parts.get(name) or _Part(name, 0, 1, False, False)
        rows = self._plain.read_rows(part.source, begin, end)
        if part.is_transposed:
            rows = rows.mT
        taken = rows if part.step == 1 else rows[:, part.first :: part.step]
        if not part.is_mxfp4:
            return taken.contiguous()
        base = part.source.removesuffix(BLOCKS)
        scales = self._plain.read_rows(base + SCALES, begin, end)[:, part.first :: part.step]
        return decode_mxfp4(taken, scales, f"{self._plain.info(part.source).file}: tensor {base}")

    def _add(self, name: str) -> None:
        """The parts of the tables that one tensor of the files gives."""
        if ".mlp.experts." not in name:
            self._parts[name] = _Part(name, 0, 1, False, False)
            return
        prefix, last = name.rsplit(".", 1)
        is_mxfp4, is_bias = last.endswith(BLOCKS), last.endswith(BIAS)
        if last.endswith(SCALES):
            return
        if is_mxfp4:
            self._pair_shape(name)
        base = last.removesuffix(BLOCKS).removesuffix(BIAS)
        halves = HALVES if base == FUSED else {base: 0}
        rank = len(self._plain.info(name).shape)
        is_transposed = base in (FUSED, "down_proj") and not is_mxfp4 and not is_bias and rank == 3
        for half, first in halves.items():
            part = _Part(name, first, len(halves), is_mxfp4, is_transposed)
            target = f"{prefix}.{half}{BIAS if is_bias else ''}"
            if target in self._parts:
                other = self._parts[target].source
                raise CorruptFileError(
                    f"{self._plain.info(name).file}: tensors {name!r:.99} and {other!r:.99} are the same"
                )
            self._parts[target] = part
        self._check_halves(name, base, is_bias)

    def _check_halves(self, name: str, base: str, is_bias: bool) -> None:
        """A fused tensor has as many gates as ups."""
        info = self._plain.info(name)
        axis = {True: 1}.get(is_bias, 1 if name.endswith(BLOCKS) else 2)
        if base == FUSED and (len(info.shape) <= axis or info.shape[axis] % 2):
            raise CorruptFileError(f"{info.file}: tensor {name!r:.200}: odd shape {list(info.shape)}")

    def _pair_shape(self, name: str) -> tuple[int, ...]:
        blocks, scales = self._plain.info(name), name.removesuffix(BLOCKS) + SCALES
        where = f"{blocks.file}: tensor {name!r:.200}"
        if scales not in self._plain:
            raise CorruptFileError(f"{where}: its scales, tensor {scales!r:.200}, are missing")
        found = self._plain.info(scales)
        shape = check_pair(blocks, found, where)
        if len(shape) != 3:
            raise CorruptFileError(f"{where}: expected experts x rows x blocks, got {list(blocks.shape)}")
        return shape
