"""A bundle read back as a checkpoint: every tensor dequantised, one block of rows or one expert at a time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kttools.checkpoint import Checkpoint, Info, Stored
from kttools.checkpoint.base import DecodedInfo
from kttools.families import SourceModel
from kttools.families.base import Family
from kttools.families.canonical import canonical_tensors
from kttools.families.layouts import experts_prefix, stacked
from kttools_runtime import _kernels
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import CorruptFileError, UsageError
from kttools_runtime.manifest import Manifest, load_manifest
from kttools_runtime.pack import PackHeader, map_pack, read_pack_header
from kttools_runtime.weights import PARTS, LinearWeights

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def open_bundle(path: str | Path) -> SourceModel:
    """The bundle as a SourceModel. Raises InvalidInputError or CorruptFileError."""
    manifest = load_manifest(path)
    root = manifest.root
    return _BundleModel(
        root, _FAMILY, manifest.model, manifest.source, [], BundleWeights(manifest), root / "tokenizer"
    )


class BundleWeights:
    """A bundle's tensors under canonical names; linears and experts in float32, whatever their format.

    Expert matrices are stacked, `model.layers.N.mlp.experts.gate_proj` and so on.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._shards = Checkpoint.open(manifest.root / "shards")
        self._linears = {
            base: format_name for base, format_name in manifest.linears.items() if format_name != "bf16"
        }
        self._packs = {layer: _Pack.open(manifest, layer) for layer in manifest.experts}
        self._names: dict[str, tuple[int, ...]] = {}
        for base, format_name in self._linears.items():
            parts = [f"{base}.{suffix}" for suffix in PARTS[format_name]]
            missing = [part for part in parts if part not in self._shards]
            if missing:
                raise CorruptFileError(
                    f"{manifest.root}: {format_name} linear {base} has no tensor {missing[0]}"
                )
        hidden = {f"{base}.{suffix}" for base, name in self._linears.items() for suffix in PARTS[name]}
        shapes = {spec.name: spec.shape for spec in canonical_tensors(manifest.model)}
        for name in self._shards.names():
            if name not in hidden:
                self._names[name] = self._shards.info(name).shape
        for base in self._linears:
            self._names[f"{base}.weight"] = shapes.get(f"{base}.weight", ())
        for layer, pack in self._packs.items():
            for projection, shape in zip(PROJECTIONS, pack.shapes, strict=True):
                self._names[experts_prefix(layer) + projection] = (pack.header.num_experts, *shape)

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self._shards.files, *(pack.file for pack in self._packs.values()))

    @property
    def index_file(self) -> Path | None:
        return None

    def names(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def info(self, name: str) -> Info:
        """Raises InvalidInputError for a name the bundle does not have."""
        if name in self._shards or name not in self._names:
            return self._shards.info(name)
        pack = self._pack(name)
        file = pack[0].file if pack else self._shards.files[0]
        return DecodedInfo(name, "F32", self._names[name], file)

    def stored(self, name: str) -> Stored:
        if name in self._shards:
            return self._shards.stored(name)
        pack = self._pack(name)
        if pack:
            formats = " + ".join(sorted(set(pack[0].header.formats)))
            return Stored(formats, sum(expert.bytes for expert in pack[0].header.experts) // len(PROJECTIONS))
        base = name.removesuffix(".weight")
        parts = [f"{base}.{suffix}" for suffix in PARTS[self._linears[base]]]
        return Stored(self._linears[base], sum(self._shards.info(part).bytes for part in parts))

    def read(self, name: str) -> torch.Tensor:
        return self.read_rows(name, 0, self._names[name][0])

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        pack = self._pack(name)
        return self.read_rows(name, index, index + 1)[0] if pack is None else pack[0].expert(index)[pack[1]]

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end); of stacked experts, that many experts."""
        if name in self._shards:
            return self._shards.read_rows(name, begin, end)
        pack = self._pack(name)
        if pack:
            return torch.stack([pack[0].expert(index)[pack[1]] for index in range(begin, end)])
        base = name.removesuffix(".weight")
        format_name = self._linears[base]
        parts = {
            suffix: self._shards.read_rows(f"{base}.{suffix}", begin, end) for suffix in PARTS[format_name]
        }
        return LinearWeights(base, self._names[name][1], format_name, parts).dequantized()

    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate [I, H], up [I, H], down [H, I] in float32."""
        return self._packs[layer].expert(expert)

    def _pack(self, name: str) -> "tuple[_Pack, int] | None":
        for layer, pack in self._packs.items():
            prefix = experts_prefix(layer)
            projection = name.removeprefix(prefix)
            if name.startswith(prefix) and projection in PROJECTIONS:
                return pack, PROJECTIONS.index(projection)
        return None


@dataclass(frozen=True, slots=True)
class _Pack:
    file: Path
    header: PackHeader

    @classmethod
    def open(cls, manifest: Manifest, layer: int) -> "_Pack":
        file = manifest.expert_path(layer)
        return cls(file, read_pack_header(file))

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        wide = (self.header.moe_intermediate_size, self.header.hidden_size)
        return wide, wide, wide[::-1]

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        header, blobs = map_pack(self.file)
        arrays = _kernels.unpack_expert(
            header.formats[index], blobs[index], header.hidden_size, header.moe_intermediate_size
        )
        gate, up, down = (torch.from_numpy(np.asarray(array)) for array in arrays)
        return gate, up, down


class _BundleModel(SourceModel):
    """A SourceModel that unpacks the three matrices of an expert at once."""

    def read_expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights = self.checkpoint
        assert isinstance(weights, BundleWeights)
        return weights.expert(layer, expert)


def _refuse(*_: object) -> tuple[ModelConfig, list[str]]:
    raise UsageError("a bundle is not made from config.json")


_FAMILY = Family(
    name="bundle",
    title="a bundle",
    architectures=(),
    model_types=(),
    read_config=_refuse,
    device_tensors=canonical_tensors,
    expert_layouts=stacked,
    experts_prefix=experts_prefix,
    left_out=lambda name, config, names: None,
)
