"""Writes bundle.json last, when every other file of the bundle is in place."""

from pathlib import Path
from typing import Any

from kttools_runtime import strict_json
from kttools_runtime.config import ModelConfig
from kttools_runtime.manifest import (
    FORMAT,
    MANIFEST_NAME,
    VERSION,
    ExpertFile,
    Manifest,
    parse_manifest,
    self_sha256,
)
from kttools_runtime.version import __version__

from .atomic import TEMPORARY_SUFFIX, atomic_write_bytes
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
) -> bytes:
    """The bytes of bundle.json. source_files: path (bare name), bytes, sha256 of what it was made from.

    files: every other file of the bundle by relative path. Raises CorruptFileError where the reader would.
    """
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "tool": {"name": "kttools", "version": __version__},
        "model": config.to_dict(),
        "source": {"config": source_config, "files": source_files},
        "recipe": recipe,
        "experts": {str(layer): expert.to_dict() for layer, expert in experts.items()},
        "linears": linears,
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
    """Builds (see build_manifest) and writes bundle.json atomically; returns it as the reader sees it."""
    root = Path(bundle_dir)
    data = build_manifest(**parts)
    atomic_write_bytes(root / MANIFEST_NAME, data)
    return parse_manifest(data, root)


def collect_files(bundle_dir: str | Path) -> list[str]:
    """Relative paths of all files of a bundle except bundle.json, dotfiles and cut-off writes."""
    root = Path(bundle_dir)
    found = []
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_dir() or is_hidden or path.name.endswith(TEMPORARY_SUFFIX):
            continue
        if relative.as_posix() != MANIFEST_NAME:
            found.append(relative.as_posix())
    return found
