"""Writes bundle.json last, when every other file of the bundle is in place."""

from pathlib import Path
from typing import Any

from kttools_runtime import strict_json
from kttools_runtime.config import ModelConfig
from kttools_runtime.expert_table import BUNDLE_TABLE, BUNDLE_TABLES, MAX_TABLE_BYTES, SUFFIX
from kttools_runtime.manifest import (
    FORMAT,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    VERSION,
    ExpertFile,
    License,
    Manifest,
    Subset,
    parse_manifest,
    self_sha256,
)
from kttools_runtime.version import __version__

from .atomic import TEMPORARY_SUFFIX, atomic_write_bytes, translate_oserror
from .hashing import FileDigest


def build_manifest(
    *,
    config: ModelConfig,
    source_config: dict[str, Any],
    source_files: list[dict[str, Any]],
    recipe: dict[str, Any],
    experts: dict[int, ExpertFile],
    linears: dict[str, str],
    files: dict[str, FileDigest],
    fingerprint: str | None = None,
    license: License | None = None,
    model_card: str | None = None,
    expert_tables: dict[str, str] | None = None,
    requires: tuple[str, ...] = (),
    subset: Subset | None = None,
    other: dict[str, Any] | None = None,
) -> bytes:
    """The bytes of bundle.json. source_files: path (bare name), bytes, sha256 of what it was made from.

    files: every other file of the bundle by relative path. The rest is as in Manifest. Raises
    CorruptFileError where the reader would.
    """
    document: dict[str, Any] = {
        **(other or {}),
        "format": FORMAT,
        "version": VERSION,
        "requires": sorted(requires),
        "tool": {"name": "kttools", "version": __version__},
        "model": config.to_dict(),
        "fingerprint": fingerprint,
        "source": {"config": source_config, "files": source_files},
        "license": (license or License()).to_dict(),
        "model_card": model_card,
        "recipe": recipe,
        "experts": {str(layer): expert.to_dict() for layer, expert in experts.items()},
        "expert_tables": expert_tables or {},
        "linears": linears,
        "subset": subset.to_dict() if subset else None,
        "files": [
            {"path": path, "bytes": d.bytes, "xxh3_128": d.xxh3_128, "sha256": d.sha256}
            for path, d in sorted(files.items())
        ],
    }
    document["manifest_sha256"] = self_sha256(document)
    data = strict_json.canonical(document)
    parse_manifest(data, Path())
    return data


def write_manifest(bundle_dir: str | Path, **parts: Any) -> Manifest:
    """Builds (see build_manifest) and writes bundle.json atomically; returns it as the reader sees it.

    A signature of the old one would be a lie about the new one, so it goes first.
    """
    root = Path(bundle_dir)
    data = build_manifest(**parts)
    try:
        (root / SIGNATURE_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise translate_oserror(error, root / SIGNATURE_NAME) from error
    atomic_write_bytes(root / MANIFEST_NAME, data)
    return parse_manifest(data, root)


def manifest_parts(manifest: Manifest) -> dict[str, Any]:
    """A manifest as the arguments of build_manifest; change some and write it again: nothing else is lost."""
    return {
        "config": manifest.model,
        "source_config": manifest.source["config"],
        "source_files": manifest.source["files"],
        "recipe": manifest.recipe,
        "experts": manifest.experts,
        "linears": manifest.linears,
        "files": {path: FileDigest(e.bytes, e.xxh3_128, e.sha256) for path, e in manifest.files.items()},
        "fingerprint": manifest.fingerprint,
        "license": manifest.license,
        "model_card": manifest.model_card,
        "expert_tables": manifest.expert_tables,
        "requires": manifest.requires,
        "subset": manifest.subset,
        "other": manifest.other,
    }


def is_table(path: str) -> bool:
    """Whether a file of a bundle is an expert table, by its path."""
    return path == BUNDLE_TABLE or (path.startswith(BUNDLE_TABLES) and path.endswith(SUFFIX))


def table_names(root: Path, paths: list[str]) -> dict[str, str]:
    """expert_tables of the manifest: what each table of `paths` calls itself. Raises InvalidInputError."""
    found = {}
    for path in sorted(filter(is_table, paths)):
        name = strict_json.read_object(root / path, MAX_TABLE_BYTES).get("name")
        found[path] = name if isinstance(name, str) else Path(path).name
    return found


def collect_files(bundle_dir: str | Path) -> list[str]:
    """Relative paths of all files of a bundle except bundle.json, its signature, dotfiles, cut-off writes."""
    root = Path(bundle_dir)
    found = []
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_dir() or is_hidden or path.name.endswith(TEMPORARY_SUFFIX):
            continue
        if relative.as_posix() not in (MANIFEST_NAME, SIGNATURE_NAME):
            found.append(relative.as_posix())
    return found
