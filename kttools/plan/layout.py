"""What a bundle holds, whether it exists or not: packs, dense tensors and their stored bytes."""

from dataclasses import dataclass
from pathlib import Path

from kttools.families import Role, SourceModel, canonical_tensors
from kttools.quantize.plan import Plan, make_plan
from kttools.quantize.recipe import make_recipe
from kttools_runtime import _kernels
from kttools_runtime.config import ModelConfig
from kttools_runtime.manifest import Manifest, load_manifest
from kttools_runtime.shards import FORMAT_PARTS, ShardWeights
from kttools_runtime.weights import PARTS

CPU_FORMATS = ("bf16", "int8", "int4_g32", "int4_g64", "int4_g128")  # largest first
GPU_FORMATS = ("bf16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A tensor of the shards. format: None when it is no quantised linear; bytes: as stored."""

    name: str
    role: Role
    elements: int
    format: str | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A bundle's parts. expert_formats: of each expert, by MoE layer; read_bytes: of the source, None when
    its headers are not there."""

    config: ModelConfig
    expert_formats: dict[int, tuple[str, ...]]
    pack_bytes: int
    tensors: tuple[DenseTensor, ...]
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
        total = sum(
            _kernels.expert_bytes(name, config.hidden_size, config.moe_intermediate_size)
            for names in self.expert_formats.values()
            for name in names
        )
        return total * config.num_experts_per_tok // config.n_routed_experts


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


def _planned_tensors(plan: Plan) -> tuple[DenseTensor, ...]:
    elements = {spec.name: spec.elements for spec in canonical_tensors(plan.source.config)}
    return tuple(
        DenseTensor(t.source.name, t.source.role, elements[t.source.name], t.format, t.bytes)
        for shard in plan.shards
        for t in shard.tensors
    )


def bundle_layout(path: Path) -> Layout:
    """A bundle's parts from its manifest and its shards' headers. Raises as load_manifest does."""
    manifest = load_manifest(path)
    packs = {expert.file for expert in manifest.experts.values()}
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    count = manifest.model.n_routed_experts
    return Layout(
        config=manifest.model,
        expert_formats={i: e.formats or (e.format,) * count for i, e in sorted(manifest.experts.items())},
        pack_bytes=sum(sizes[name] for name in packs),
        tensors=_stored_tensors(manifest),
        shard_bytes=sum(size for name, size in sizes.items() if name.startswith("shards/")),
        tokenizer_bytes=sum(size for name, size in sizes.items() if name.startswith("tokenizer/")),
        read_bytes=None,
    )


def _stored_tensors(manifest: Manifest) -> tuple[DenseTensor, ...]:
    files = [manifest.path(name) for name in manifest.files if name.endswith(".safetensors")]
    infos = ShardWeights(files, manifest.linears).infos
    found = []
    for spec in canonical_tensors(manifest.model):
        base = spec.name.removesuffix(".weight")
        form = manifest.linears.get(base) if spec.role.is_linear else None
        names = [f"{base}.{part}" for part in PARTS[FORMAT_PARTS[form]]] if form else [spec.name]
        stored = sum(infos[name].bytes for name in names if name in infos)
        found.append(DenseTensor(spec.name, spec.role, spec.elements, form, stored))
    return tuple(found)
