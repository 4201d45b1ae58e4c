"""What a bundle holds, whether it exists or not: packs, dense tensors and their stored bytes."""

from dataclasses import dataclass
from pathlib import Path

from kttools.families import SourceModel, canonical_tensors
from kttools.quantize.plan import Plan, make_plan
from kttools.quantize.recipe import make_recipe
from kttools_runtime import _kernels
from kttools_runtime.config import ModelConfig
from kttools_runtime.footprint import StoredTensor, stored_tensors
from kttools_runtime.hybrid.hot_codes import hot_expert_bytes
from kttools_runtime.manifest import load_manifest
from kttools_runtime.shards import ShardWeights

GPU_FORMATS = ("bf16", "int8", "int4")  # largest first


def smaller_cpu_formats(name: str) -> tuple[str, ...]:
    """The pack formats below a pack format that any checkpoint can be quantised to, largest first.

    GGUF's own block formats (q4_k, ...) are kept from a file, never made.
    """
    size = _kernels.expert_bytes(name, 8192, 8192)
    sizes = {other: _kernels.expert_bytes(other, 8192, 8192) for other in _kernels.FORMATS}
    below = [other for other in sizes if sizes[other] < size]
    return tuple(sorted(below, key=lambda other: -sizes[other]))


@dataclass(frozen=True, slots=True)
class Layout:
    """A bundle's parts. expert_formats: of each expert, by MoE layer; read_bytes: of the source, None when
    its headers are not there."""

    config: ModelConfig
    expert_formats: dict[int, tuple[str, ...]]
    pack_bytes: int
    tensors: tuple[StoredTensor, ...]
    shard_bytes: int
    tokenizer_bytes: int
    read_bytes: int | None

    @property
    def bundle_bytes(self) -> int:
        """Packs, shards and tokenizer; manifest and error report are not counted."""
        return self.pack_bytes + self.shard_bytes + self.tokenizer_bytes

    @property
    def compute_format(self) -> str:
        """The arithmetic of the experts, as measure_compute names it."""
        formats = {name for names in self.expert_formats.values() for name in names}
        return "bf16" if formats == {"bf16"} else "int8"

    @property
    def chosen_expert_bytes(self) -> int:
        """Bytes of one token's experts in all MoE layers, each of average size."""
        config = self.config
        sizes = {name: self.expert_bytes(name) for names in self.expert_formats.values() for name in names}
        total = sum(sizes[name] for names in self.expert_formats.values() for name in names)
        return total * config.num_experts_per_tok // config.n_routed_experts

    @property
    def bytes_by_format(self) -> dict[str, int]:
        """Of the packs' experts, by name; the packs' headers are not among them."""
        names = [name for formats in self.expert_formats.values() for name in formats]
        return {name: names.count(name) * self.expert_bytes(name) for name in sorted(set(names))}

    @property
    def hot_expert_bytes(self) -> int:
        """Of one routed expert on a GPU, the largest that occurs; 0 without any."""
        shape = (self.config.hidden_size, self.config.moe_intermediate_size)
        return hot_expert_bytes(self.expert_formats.values(), *shape)

    def expert_bytes(self, name: str) -> int:
        """One expert of a format, as a pack holds it."""
        return _kernels.expert_bytes(name, self.config.hidden_size, self.config.moe_intermediate_size)


def source_layout(source: SourceModel, cpu_format: str, gpu_format: str, group_size: int) -> Layout:
    """What quantize would make of a source with these formats. Raises as make_plan does."""
    plan = make_plan(source, make_recipe(cpu_format, gpu_format, group_size))
    return Layout(
        config=source.config,
        expert_formats={pack.layer: pack.formats for pack in plan.packs},
        pack_bytes=plan.expert_bytes,
        tensors=_planned_tensors(plan),
        shard_bytes=plan.shard_bytes,
        tokenizer_bytes=plan.tokenizer_bytes,
        read_bytes=source.source_bytes if source.checkpoint.files else None,
    )


def _planned_tensors(plan: Plan) -> tuple[StoredTensor, ...]:
    shapes = {spec.name: spec.shape for spec in canonical_tensors(plan.source.config)}
    return tuple(
        StoredTensor(t.source.name, shapes[t.source.name], t.format, t.bytes)
        for shard in plan.shards
        for t in shard.tensors
    )


def bundle_layout(path: Path) -> Layout:
    """A bundle's parts from its manifest and its shards' headers. Raises as load_manifest does."""
    manifest = load_manifest(path)
    packs = {expert.file for expert in manifest.experts.values()}
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    count = manifest.model.n_routed_experts
    shards = ShardWeights([manifest.path(n) for n in sizes if n.endswith(".safetensors")], manifest.linears)
    return Layout(
        config=manifest.model,
        expert_formats={i: e.formats or (e.format,) * count for i, e in sorted(manifest.experts.items())},
        pack_bytes=sum(sizes[name] for name in packs),
        tensors=tuple(stored_tensors(shards.infos, manifest.linears)),
        shard_bytes=sum(size for name, size in sizes.items() if name.startswith("shards/")),
        tokenizer_bytes=sum(size for name, size in sizes.items() if name.startswith("tokenizer/")),
        read_bytes=None,
    )
