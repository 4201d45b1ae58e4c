"""The device weights of a bundle: safetensors shards as a WeightSource."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, int16

from .block_formats import BLOCK_FORMATS, BLOCKS_PART, first_bad_scale
from .errors import CorruptFileError
from .safetensors_file import TensorInfo, read_header, read_tensor
from .weights import PARTS, LinearWeights

# Name of a format in the manifest -> in weights.PARTS.
FORMAT_PARTS = {"bf16": "float", "int8": "int8", "int4": "int4", **{name: name for name in BLOCK_FORMATS}}
GROUP_SIZES = (32, 64, 128)
# The one text of a shard's header that nothing else depends on; so any flipped bit of a header is noticed.
METADATA = {"format": "pt"}


class ShardWeights:
    """Tensors of several safetensors files by name. Only headers are read until a tensor is asked for.

    formats: the manifest's `linears`, tensor base name -> "bf16" | "int8" | "int4" | a block format; what the
    shards hold must agree. Raises CorruptFileError for a broken or foreign header, a name in two files, or a
    tensor that is missing or misshapen.
    """

    def __init__(self, files: Iterable[Path], formats: dict[str, str]) -> None:
        self.formats = formats
        self.infos: dict[str, TensorInfo] = {}
        for file in sorted(files):
            header = read_header(file)
            if header.metadata not in ({}, METADATA):
                raise CorruptFileError(f"{file}: __metadata__ is not what shards have: {METADATA}")
            for name, info in header.tensors.items():
                if name in self.infos:
                    raise CorruptFileError(f"{file}: tensor {name} is also in {self.infos[name].file}")
                self.infos[name] = info

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        info = self._info(name)
        if tuple(info.shape) != shape:
            raise CorruptFileError(
                f"{info.file}: tensor {name}: expected shape {list(shape)}, got {list(info.shape)}"
            )
        return read_tensor(info)

    def linear(self, base: str, out_features: int, in_features: int) -> LinearWeights:
        """The format is recognised by the suffixes present; which of the block formats, by the manifest."""
        form = self._format(base)
        parts = {suffix: read_tensor(self._info(f"{base}.{suffix}")) for suffix in PARTS[form]}
        matrix = LinearWeights(base, in_features, form, parts)
        self._check_values(matrix)
        if matrix.out_features != out_features:
            file = self._info(f"{base}.{PARTS[form][0]}").file
            raise CorruptFileError(
                f"{file}: {base}: expected {out_features} output rows, got {matrix.out_features}"
            )
        return matrix

    def _check_values(self, matrix: LinearWeights) -> None:
        """What no kernel checks: scales that are numbers, and int4 groups whose weights all fit int8."""
        parts = matrix.parts
        file = self._info(f"{matrix.name}.{next(iter(parts))}").file
        if "row_scale" in parts and not bool(parts["row_scale"].isfinite().all()):
            raise CorruptFileError(
                f"{file}: {matrix.name}.row_scale holds a value that is not a finite number"
            )
        if matrix.is_blocks:
            _check_block_scales(matrix, file)
        if matrix.format != "int4":
            return
        if matrix.group_size not in GROUP_SIZES:
            expected = ", ".join(map(str, GROUP_SIZES))
            raise CorruptFileError(
                f"{file}: {matrix.name}: groups of {matrix.group_size}, expected one of {expected}"
            )
        scale, zero = (parts[name].to(int16) for name in ("group_scale", "group_zero"))
        is_int8 = (scale >= 1) & (scale <= 16) & (zero <= 128) & (15 * scale - zero <= 127)
        if not bool(is_int8.all()):
            raise CorruptFileError(
                f"{file}: {matrix.name}: a group's scale and zero leave int8, expected 1 <= s <= 16 and "
                "15 s - 127 <= z <= 128"
            )

    def _format(self, base: str) -> str:
        listed = self.formats.get(base)
        if f"{base}.{BLOCKS_PART}" in self.infos:
            if listed is None or listed not in BLOCK_FORMATS:
                raise CorruptFileError(f"{base}: the manifest says {listed}, the shards hold blocks")
            return listed
        present = [form for form, suffixes in PARTS.items() if self._has_all(base, suffixes)]
        if not present:
            raise CorruptFileError(f"no shard holds {base}.weight in any format; quantize the model again")
        form = present[-1]  # int4's parts include int8's
        if listed is not None and FORMAT_PARTS.get(listed) != form:
            raise CorruptFileError(f"{base}: the manifest says {listed}, the shards hold {form}")
        return form

    def _has_all(self, base: str, suffixes: tuple[str, ...]) -> bool:
        return all(f"{base}.{suffix}" in self.infos for suffix in suffixes)

    def _info(self, name: str) -> TensorInfo:
        info = self.infos.get(name)
        if info is None:
            raise CorruptFileError(f"no shard holds tensor {name}; quantize the model again")
        return info


def _check_block_scales(matrix: LinearWeights, file: Path) -> None:
    bad = first_bad_scale(matrix.format, matrix.parts[BLOCKS_PART].numpy())
    if bad:
        raise CorruptFileError(
            f"{file}: {matrix.name}.{BLOCKS_PART}: the scale of the block at {list(bad)} is not finite"
        )
