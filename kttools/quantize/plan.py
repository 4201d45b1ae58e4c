"""Sizes before work: what will be read and written, and the RAM it takes, from shapes alone."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kttools.bundle.render import size
from kttools.families import SourceModel
from kttools_runtime import _kernels
from kttools_runtime.block_formats import BLOCK_FORMATS
from kttools_runtime.errors import InvalidInputError, ResourceError
from kttools_runtime.pack import PackHeader
from kttools_runtime.pack_writer import plan_header
from kttools_runtime.safetensors_file import DTYPES

from .blocks import kept_format
from .recipe import Recipe
from .rules import KEPT_FORMAT
from .shard_layout import ShardFile, index_bytes, shard_files, shard_tensor

# Interpreter, torch and NumPy before the first weight is read: 233 MB measured, the rest is slack.
BASE_BYTES = 400_000_000
# Source bytes of a shard's tensor held at once; beside them at most four float32 copies of a bf16 block.
ROWS_BYTES = 32 << 20
ROWS_WORKER_BYTES = 12 * ROWS_BYTES
# Report and manifest, which no shape predicts: about this much for a matrix and for everything else.
REPORT_MATRIX_BYTES = 400
SMALL_FILES_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PackPlan:
    """One pack to write; path: relative to the bundle."""

    path: str
    layer: int
    formats: tuple[str, ...]
    header: PackHeader

    @property
    def bytes(self) -> int:
        return self.header.file_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything quantize will write, in the order it will."""

    source: SourceModel
    recipe: Recipe
    packs: tuple[PackPlan, ...]
    shards: tuple[ShardFile, ...]
    index: bytes
    workers: int

    @property
    def expert_source_bytes(self) -> int:
        """Bytes of one routed expert in the checkpoint (as float32 when dtypes are mixed)."""
        config = self.source.config
        item = DTYPES[self.source.expert_dtype][0]
        return 3 * config.hidden_size * config.moe_intermediate_size * item

    @property
    def expert_bytes(self) -> int:
        return sum(pack.bytes for pack in self.packs)

    @property
    def shard_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards) + len(self.index)

    @property
    def expert_formats(self) -> dict[str, int]:
        """Number of experts by format."""
        return dict(sorted(Counter(name for pack in self.packs for name in pack.formats).items()))

    @property
    def linear_formats(self) -> dict[str, int]:
        """Number of the shards' linears by format."""
        named = (tensor.format for shard in self.shards for tensor in shard.tensors)
        return dict(sorted(Counter(name for name in named if name).items()))

    @property
    def tokenizer_bytes(self) -> int:
        copied = sum(file.stat().st_size for file in self.source.tokenizer_files.values())
        return copied + sum(len(data) for data in self.source.tokenizer_data.values())

    @property
    def report_bytes_estimate(self) -> int:
        config = self.source.config
        matrices = 3 * len(self.packs) * config.n_routed_experts + len(self.source.tensors)
        return matrices * REPORT_MATRIX_BYTES + SMALL_FILES_BYTES

    @property
    def write_bytes(self) -> int:
        """Packs, shards and tokenizer; exact."""
        return self.expert_bytes + self.shard_bytes + self.tokenizer_bytes

    @property
    def worker_bytes(self) -> int:
        """RAM of one worker: an expert as read (F16 also as float32), its blob, and that as float32."""
        if not self.packs:
            return ROWS_WORKER_BYTES
        config = self.source.config
        wide = 3 * config.hidden_size * config.moe_intermediate_size * 4
        converted = wide if self.source.expert_dtype == "F16" else 0
        blob = max(expert.bytes for pack in self.packs for expert in pack.header.experts)
        return max(ROWS_WORKER_BYTES, self.expert_source_bytes + converted + blob + wide + ROWS_BYTES)

    @property
    def ram_bytes(self) -> int:
        return BASE_BYTES + self.workers * self.worker_bytes

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "source": str(self.source.path),
            "family": self.source.family,
            "recipe": self.recipe.to_dict(),
            "workers": self.workers,
            "read_bytes": self.source.source_bytes,
            "write_bytes": {
                "total": self.write_bytes,
                "experts": self.expert_bytes,
                "shards": self.shard_bytes,
                "tokenizer": self.tokenizer_bytes,
            },
            "ram_bytes": self.ram_bytes,
            "packs": [{"path": p.path, "formats": Counter(p.formats), "bytes": p.bytes} for p in self.packs],
            "formats": {"experts": self.expert_formats, "linears": self.linear_formats},
            "shards": [{"path": f"shards/{s.name}", "bytes": s.bytes} for s in self.shards],
            "notices": list(self.source.notices),
        }


def make_plan(source: SourceModel, recipe: Recipe, workers: int = 1) -> Plan:
    """Reads nothing but what `source` already knows.

    Raises KTError for sizes no pack can hold and for a rule of the recipe that matches nothing.
    """
    experts = [(layer, e) for layer in source.moe_layers for e in range(source.config.n_routed_experts)]
    recipe.check(experts, [tensor.name for tensor in source.tensors if tensor.role.is_linear])
    shards = shard_files(shard_tensor(tensor, recipe) for tensor in source.tensors)
    _check_kept(source, recipe, shards)
    packs = tuple(_pack_plan(source, layer, recipe) for layer in source.moe_layers)
    return Plan(source, recipe, packs, shards, index_bytes(shards), workers)


def _check_kept(source: SourceModel, recipe: Recipe, shards: tuple[ShardFile, ...]) -> None:
    """Raises InvalidInputError when blocks are to be kept and no linear has any."""
    formats = {tensor.format for shard in shards for tensor in shard.tensors}
    if recipe.gpu_format == KEPT_FORMAT and not formats & set(BLOCK_FORMATS):
        raise InvalidInputError(
            f"{source.path}: no linear is stored in blocks that --gpu-format {KEPT_FORMAT} could keep (Q4_K, "
            "Q5_K, Q6_K, Q8_0 of a GGUF file); choose int4, int8 or bf16"
        )


def _pack_plan(source: SourceModel, layer: int, recipe: Recipe) -> PackPlan:
    config = source.config
    asked = recipe.expert_formats(layer, config.n_routed_experts)
    formats = tuple(
        kept_format(source, layer, expert) if name in _kernels.BLOCK_FORMATS else name
        for expert, name in enumerate(asked)
    )
    header = plan_header(
        layer=layer,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_intermediate_size,
        formats=formats,
    )
    return PackPlan(f"experts/layer-{layer:05d}.ktpack", layer, formats, header)


@dataclass(frozen=True, slots=True)
class Resources:
    """What the machine has for this plan.

    finished: bytes of files that a resumed run keeps; replaced: bytes that --force frees.
    """

    disk_free_bytes: int
    ram_available_bytes: int
    finished_bytes: int = 0
    replaced_bytes: int = 0

    def disk_needed(self, plan: Plan) -> int:
        """Bytes that must be free for what is still to be written."""
        needed = plan.write_bytes + plan.report_bytes_estimate
        return max(0, needed - self.finished_bytes - self.replaced_bytes)

    def check(self, plan: Plan, target: Path) -> None:
        """Raises ResourceError with needed, available and the smallest change that would fit."""
        needed = self.disk_needed(plan)
        if needed > self.disk_free_bytes:
            missing = size(needed - self.disk_free_bytes)
            raise ResourceError(
                f"{target}: not enough disk: {size(needed)} needed, {size(self.disk_free_bytes)} available; "
                f"free {missing} or choose smaller formats"
            )
        if plan.ram_bytes > self.ram_available_bytes:
            fitting = (self.ram_available_bytes - BASE_BYTES) // plan.worker_bytes
            remedy = f"use --workers {fitting}" if fitting >= 1 else "free some memory"
            raise ResourceError(
                f"not enough RAM for {plan.workers} workers: {size(plan.ram_bytes)} needed, "
                f"{size(self.ram_available_bytes)} available; {remedy}"
            )


def find_resources(target: Path, finished_bytes: int = 0, replaced_bytes: int = 0) -> Resources:
    """Free disk where `target` is or will be, and RAM the kernel can give without swapping."""
    import psutil

    place = target.absolute()
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    ram = psutil.virtual_memory().available
    return Resources(status.f_bavail * status.f_frsize, ram, finished_bytes, replaced_bytes)


def render_plan(plan: Plan, resources: Resources) -> str:
    """The plan as text."""
    recipe = plan.recipe
    experts = f"{len(plan.packs)} packs, {_listed(plan.expert_formats) or recipe.cpu_format}"
    is_mixed = bool(recipe.rules) or recipe.gpu_format == KEPT_FORMAT
    linears = _listed(plan.linear_formats) if is_mixed else recipe.gpu_format
    shards = f"{len(plan.shards)} shards, {linears}"
    if recipe.gpu_format == "int4":
        shards += f" in groups of {recipe.group_size}"
    rows = [
        ("source", f"{plan.source.path} ({plan.source.family})"),
        ("read", size(plan.source.source_bytes)),
        ("write", size(plan.write_bytes)),
        ("  experts", f"{size(plan.expert_bytes)} ({experts})"),
        ("  shards", f"{size(plan.shard_bytes)} ({shards})"),
        ("  tokenizer", size(plan.tokenizer_bytes)),
        ("disk", f"{size(resources.disk_needed(plan))} needed, {size(resources.disk_free_bytes)} available"),
        (
            "RAM",
            f"{size(plan.ram_bytes)} needed by {plan.workers} workers, "
            f"{size(resources.ram_available_bytes)} available",
        ),
    ]
    rows += [("recipe", text) for text in recipe.to_dict().get("rules", ())]
    if resources.finished_bytes:
        rows.append(("finished", f"{size(resources.finished_bytes)} by an earlier run, kept"))
    return "\n".join(f"{name:<13}{value}" for name, value in rows)


def _listed(formats: dict[str, int]) -> str:
    """int8, or 12 int8 and 6 int4_g64."""
    if len(formats) < 2:
        return "".join(formats)
    return " and ".join(f"{count} {name}" for name, count in formats.items())
