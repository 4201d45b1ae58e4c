"""What is in a bundle, a checkpoint, a safetensors file or a pack: facts as one JSON-able document.

Only headers are read, so it takes a moment whatever the size. `render.py` beside this turns it into text.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kttools.checkpoint import Checkpoint, TensorInfo, Weights
from kttools.checkpoint.gguf import is_gguf
from kttools.checkpoint.gguf.splits import open_files
from kttools.families import Role, SourceModel, canonical_tensors, open_model
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError, UnsupportedModelError
from kttools_runtime.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, load_manifest
from kttools_runtime.pack import read_pack_header
from kttools_runtime.safetensors_file import read_header

from .manifest import collect_files

PACK_SUFFIX = ".ktpack"
MAX_SHOWN_CHARS = 200  # of a metadata value; templates and vocabularies are longer


def inspect_path(path: str | Path) -> dict[str, Any]:
    """A document whose `kind` is bundle, checkpoint, gguf, safetensors or pack.

    Raises InvalidInputError when the path is none of them, CorruptFileError when it breaks a rule.
    """
    found = Path(path)
    if found.name == MANIFEST_NAME and found.is_file():
        found = found.parent
    if is_gguf(found) and found.exists() and not (found / MANIFEST_NAME).exists():
        return _gguf(found)
    if found.is_dir():
        return _bundle(found) if (found / MANIFEST_NAME).exists() else _checkpoint(found)
    if not found.exists():
        raise InvalidInputError(f"{found}: no such file or directory")
    if found.suffix == PACK_SUFFIX:
        return _pack(found)
    if found.suffix == ".safetensors":
        return _safetensors(found)
    if found.name == "config.json" or found.name.endswith(".index.json"):
        return _checkpoint(found.parent)
    kinds = "a bundle, a checkpoint directory, a .safetensors, .gguf or .ktpack file"
    raise InvalidInputError(f"{found}: expected {kinds}")


def _bundle(root: Path) -> dict[str, Any]:
    manifest = load_manifest(root, allow_partial=True)
    shards = Checkpoint.open(root / "shards")
    parameters = _parameters(manifest.model)
    sizes = {path: entry.bytes for path, entry in manifest.files.items()}
    return {
        "kind": "bundle",
        "path": str(root),
        "tool": manifest.tool,
        "model": manifest.model.to_dict(),
        "parameters": _parameter_summary(manifest.model, parameters),
        "bytes": {
            "total": sum(sizes.values()),
            "experts": sum(sizes[expert.file] for expert in manifest.experts.values()),
            "shards": sum(size for name, size in sizes.items() if name.startswith("shards/")),
            "by_format": _bytes_by_format(manifest, shards),
        },
        "fingerprint": manifest.fingerprint,
        "requires": list(manifest.requires),
        "license": manifest.license.to_dict(),
        "model_card": manifest.model_card,
        "expert_tables": manifest.expert_tables,
        "is_signed": (root / SIGNATURE_NAME).exists(),
        "unknown_keys": sorted(manifest.other),
        "recipe": manifest.recipe,
        "experts": {
            str(layer): expert.to_dict() | {"bytes": sizes[expert.file]}
            for layer, expert in sorted(manifest.experts.items())
        },
        "linears": dict(sorted(Counter(manifest.linears.values()).items())),
        "files": [{"path": name, "bytes": size} for name, size in sizes.items()],
        "extra_files": [name for name in collect_files(root) if name not in manifest.files],
        "source": {"files": manifest.source["files"]},
        "subset": manifest.subset.to_dict() if manifest.subset else None,
        "manifest_sha256": manifest.manifest_sha256,
    }


def _bytes_by_format(manifest: Manifest, shards: Checkpoint) -> dict[str, int]:
    """Bytes on disk per format: packs by expert format, linears by theirs, other tensors by dtype.

    A pack of several formats is counted expert by expert, its header with the format of its first.
    """
    found: Counter[str] = Counter()
    for expert in manifest.experts.values():
        rest = manifest.files[expert.file].bytes
        entries = read_pack_header(manifest.root / expert.file).experts if expert.formats else ()
        for name, entry in zip(expert.formats, entries, strict=True):
            found[f"experts {name}"] += entry.bytes
            rest -= entry.bytes
        found[f"experts {(expert.formats or (expert.format,))[0]}"] += rest
    for name in shards.names():
        info = shards.info(name)
        format_name = manifest.linears.get(name.rpartition(".")[0])
        found[f"linears {format_name}" if format_name else f"other {info.dtype}"] += info.bytes
    return dict(sorted(found.items()))


def _checkpoint(root: Path) -> dict[str, Any]:
    """A model we know with roles; another one as far as its tensors go, with the reason why."""
    try:
        source = open_model(root)
    except UnsupportedModelError as error:
        checkpoint = Checkpoint.open(root)
        return _checkpoint_facts(root, checkpoint) | {"family": None, "notices": [str(error)]}
    return _checkpoint_facts(root, source.checkpoint) | _model_facts(source)


def _gguf(path: Path) -> dict[str, Any]:
    """As a checkpoint, with the metadata; a model we do not know as far as its tensors go."""
    files = open_files(path)
    by_type: Counter[str] = Counter()
    by_file: Counter[str] = Counter()
    for tensor in files.tensors.values():
        by_type[tensor.kind.name] += tensor.bytes
        by_file[tensor.file.name] += 1
    facts: dict[str, Any] = {
        "kind": "gguf",
        "path": str(path),
        "tensors": len(files.tensors),
        "bytes": {"total": sum(by_type.values()), "by_format": dict(sorted(by_type.items()))},
        "files": [
            {"path": file.name, "bytes": file.stat().st_size, "tensors": by_file[file.name]}
            for file in files.files
        ],
        "metadata": {
            key: value
            for key, value in files.metadata.values.items()
            if isinstance(value, bool | int | float | str) and len(str(value)) <= MAX_SHOWN_CHARS
        },
    }
    try:
        return facts | _model_facts(open_model(path))
    except UnsupportedModelError as error:
        return facts | {"family": None, "notices": [str(error)]}


def _model_facts(source: SourceModel) -> dict[str, Any]:
    return {
        "family": source.family,
        "notices": source.notices,
        "model": source.config.to_dict(),
        "parameters": _parameter_summary(source.config, source.parameters_by_role()),
        "experts": _expert_facts(source),
        "tokenizer": source.tokenizer_names,
    }


def _expert_facts(source: SourceModel) -> dict[str, Any] | None:
    if not source.moe_layers:
        return None
    layouts = Counter(source.expert_layout(layer) for layer in source.moe_layers)
    return {"layers": len(source.moe_layers), "dtype": source.expert_dtype, "stored": dict(layouts)}


def _checkpoint_facts(root: Path, checkpoint: Weights) -> dict[str, Any]:
    names = checkpoint.names()
    stored = [checkpoint.stored(name) for name in names]
    by_file = Counter(checkpoint.info(name).file.name for name in names)
    by_format: Counter[str] = Counter()
    for entry in stored:
        by_format[entry.dtype] += entry.bytes
    return {
        "kind": "checkpoint",
        "path": str(root),
        "tensors": len(names),
        "bytes": {
            "total": sum(entry.bytes for entry in stored),
            "by_format": dict(sorted(by_format.items())),
        },
        "files": [
            {"path": file.name, "bytes": file.stat().st_size, "tensors": by_file[file.name]}
            for file in checkpoint.files
        ],
    }


def _safetensors(file: Path) -> dict[str, Any]:
    header = read_header(file)
    infos = list(header.tensors.values())
    return {
        "kind": "safetensors",
        "path": str(file),
        "metadata": header.metadata,
        "bytes": {"total": header.file_bytes, "by_format": _bytes_by_dtype(infos)},
        "tensors": [
            {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.bytes}
            for info in infos
        ],
    }


def _pack(file: Path) -> dict[str, Any]:
    header = read_pack_header(file)
    weights = 3 * header.num_experts * header.hidden_size * header.moe_intermediate_size
    return {
        "kind": "pack",
        "path": str(file),
        "layer": header.layer,
        "num_experts": header.num_experts,
        "hidden_size": header.hidden_size,
        "moe_intermediate_size": header.moe_intermediate_size,
        "formats": dict(sorted(Counter(header.formats).items())),
        "parameters": {"total": weights},
        "bytes": {"total": header.file_bytes, "header": header.header_bytes},
        "bits_per_weight": round(8 * header.file_bytes / weights, 3),
    }


def _bytes_by_dtype(infos: Iterable[TensorInfo]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for info in infos:
        found[info.dtype] += info.bytes
    return dict(sorted(found.items()))


def _parameters(config: ModelConfig) -> dict[Role, int]:
    found: Counter[Role] = Counter()
    for spec in canonical_tensors(config):
        found[spec.role] += spec.elements
    if config.moe_layers:
        found[Role.EXPERT] = len(config.moe_layers) * config.n_routed_experts * _expert_parameters(config)
    return dict(found)


def parameter_counts(config: ModelConfig) -> dict[str, Any]:
    """Parameters of a model with this config; see _parameter_summary."""
    return _parameter_summary(config, _parameters(config))


def _expert_parameters(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.moe_intermediate_size


def _parameter_summary(config: ModelConfig, by_role: dict[Role, int]) -> dict[str, Any]:
    """total; active: what one token multiplies with (its experts, everything else, no embedding lookup)."""
    total = sum(by_role.values())
    active_experts = len(config.moe_layers) * config.num_experts_per_tok * _expert_parameters(config)
    lookup = 0 if config.tie_word_embeddings else by_role.get(Role.EMBEDDING, 0)
    active = total - by_role.get(Role.EXPERT, 0) - lookup + active_experts
    return {"total": total, "active": active, "by_role": {role.value: n for role, n in by_role.items()}}
