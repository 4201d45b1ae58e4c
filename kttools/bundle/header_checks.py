"""What the headers of a bundle's packs and shards say, held against its manifest and its model."""

from collections.abc import Iterator, Set

from kttools.checkpoint import Checkpoint
from kttools.families import Role, TensorSpec, canonical_tensors
from kttools_runtime.block_formats import BLOCK_FORMATS, BLOCKS_PART
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.manifest import Manifest
from kttools_runtime.pack import read_pack_header
from kttools_runtime.pack_match import pack_problems
from kttools_runtime.weights import PARTS


def header_problems(manifest: Manifest, present: Set[str]) -> list[str]:
    """One line per problem; files that are not `present` are left out, their loss is known."""
    return [*_pack_problems(manifest, present), *_shard_problems(manifest, present)]


def _pack_problems(manifest: Manifest, present: Set[str]) -> Iterator[str]:
    """What a pack's header says against the manifest; only packs whose files are otherwise sound."""
    for layer, expert in manifest.experts.items():
        if expert.file not in present:
            continue
        try:
            header = read_pack_header(manifest.root / expert.file)
        except InvalidInputError as error:
            yield f"{expert.file}: {error}"
            continue
        yield from (f"{expert.file}: {problem}" for problem in pack_problems(header, manifest, layer))


def _shard_problems(manifest: Manifest, present: Set[str]) -> Iterator[str]:
    """Shard headers, their index, and that every listed linear is there in its format."""
    shards = [path for path in manifest.files if path.startswith("shards/")]
    if not all(path in present for path in shards):
        return
    if not shards:
        yield "shards/: no shards are listed"
        return
    try:
        checkpoint = Checkpoint.open(manifest.root / "shards")
    except InvalidInputError as error:
        yield f"shards/: {error}"
        return
    listed = {manifest.root / path for path in shards}
    for file in checkpoint.files:
        if file not in listed:
            yield f"shards/{file.name}: used by the index but not listed in bundle.json"
    yield from _tensor_problems(manifest, checkpoint)


def _tensor_problems(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    """Every tensor of the model is in the shards, whole or as the parts of its format."""
    specs = {spec.name: spec for spec in canonical_tensors(manifest.model)}
    for base, format_name in manifest.linears.items():
        spec = specs.get(f"{base}.weight")
        is_kept = spec is not None and spec.role is Role.EMBEDDING and format_name in BLOCK_FORMATS
        if spec is None or not (spec.role.is_linear or is_kept):
            yield f"linears: {base} is no linear of this model"
    for spec in specs.values():
        base = spec.name.removesuffix(".weight")
        stored = manifest.linears.get(base, "bf16")
        if stored == "bf16":
            yield from _whole_tensor_problems(spec, checkpoint)
            continue
        for part in PARTS[stored]:
            if f"{base}.{part}" not in checkpoint:
                yield f"shards/: {stored} linear {base} has no tensor {base}.{part}"
            elif part == BLOCKS_PART:
                yield from _block_problems(spec, stored, checkpoint)


def _whole_tensor_problems(spec: TensorSpec, checkpoint: Checkpoint) -> Iterator[str]:
    if spec.name not in checkpoint:
        yield f"shards/: tensor {spec.name} is missing"
    elif checkpoint.info(spec.name).shape != spec.shape:
        got = list(checkpoint.info(spec.name).shape)
        yield f"shards/: tensor {spec.name}: expected shape {list(spec.shape)}, got {got}"


def _block_problems(spec: TensorSpec, format_name: str, checkpoint: Checkpoint) -> Iterator[str]:
    """That rows of blocks are as many and as long as the model's matrix wants them."""
    name = f"{spec.name.removesuffix('.weight')}.{BLOCKS_PART}"
    info = checkpoint.info(name)
    row_bytes = BLOCK_FORMATS[format_name].row_bytes(spec.shape[-1])
    if (info.dtype, info.shape) != ("U8", (spec.shape[0], row_bytes)):
        got = f"{info.dtype} {list(info.shape)}"
        yield f"shards/: tensor {name}: expected U8 {[spec.shape[0], row_bytes]} of {format_name}, got {got}"
