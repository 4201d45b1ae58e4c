"""Checks a bundle against its manifest: every byte of every listed file, and that headers say the same.

All problems are collected before anything is raised, so that one run shows the whole damage.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kttools.checkpoint import Checkpoint
from kttools.families import TensorSpec, canonical_tensors
from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.manifest import FileEntry, Manifest, presence_problem, read_manifest
from kttools_runtime.pack import read_pack_header
from kttools_runtime.weights import PARTS

from .hashing import digest_file
from .manifest import collect_files

SHARD_INDEX = "shards/model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Verification:
    """Outcome of verify. problems: one line each, empty when the bundle is sound; extra: unlisted files."""

    bundle: Path
    files: int
    bytes: int
    is_quick: bool
    problems: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    def raise_on_problems(self) -> None:
        """Raises CorruptFileError with the first problem and the number of all."""
        if self.problems:
            count = len(self.problems)
            more = f" (first of {count} problems)" if count > 1 else ""
            raise CorruptFileError(f"{self.bundle}: {self.problems[0]}{more}")


def verify_bundle(
    bundle_dir: str | Path,
    *,
    is_quick: bool = False,
    threads: int | None = None,
    on_start: Callable[[int], object] | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> Verification:
    """Verifies a bundle; is_quick: manifest, sizes and headers only.

    on_start: called once with the number of bytes to read; on_bytes: with each block, from several threads.
    Raises InvalidInputError when there is no bundle and CorruptFileError when the manifest itself is damaged.
    """
    manifest = read_manifest(bundle_dir)
    entries = list(manifest.files.values())
    problems = _file_problems(manifest, entries, 0 if is_quick else threads or _threads(), on_start, on_bytes)
    present = {path for path in manifest.files if not any(p.startswith(f"{path}:") for p in problems)}
    problems += [*_pack_problems(manifest, present), *_shard_problems(manifest, present)]
    extra = [path for path in collect_files(manifest.root) if path not in manifest.files]
    total = sum(entry.bytes for entry in entries)
    return Verification(manifest.root, len(entries), total, is_quick, problems, extra)


def _threads() -> int:
    return min(8, len(os.sched_getaffinity(0)))


def _file_problems(
    manifest: Manifest,
    entries: list[FileEntry],
    threads: int,
    on_start: Callable[[int], object] | None,
    on_bytes: Callable[[int], object] | None,
) -> list[str]:
    """Presence and size of every file; with threads, also the hashes, largest files first."""
    absent = {entry.path: presence_problem(manifest.root, entry) for entry in entries}
    problems = [f"{path}: {problem}" for path, problem in absent.items() if problem]
    readable = [entry for entry in entries if absent[entry.path] is None]
    if not threads:
        return problems
    if on_start:
        on_start(sum(entry.bytes for entry in readable))
    readable.sort(key=lambda entry: -entry.bytes)
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda entry: _content_problem(manifest.root, entry, on_bytes), readable)
        return problems + sorted(problem for problem in found if problem)


def _content_problem(root: Path, entry: FileEntry, on_bytes: Callable[[int], object] | None) -> str | None:
    try:
        digest = digest_file(root / entry.path, on_bytes)
    except InvalidInputError as error:
        return f"{entry.path}: {error}"
    for kind in ("sha256", "xxh3_128"):
        expected, got = getattr(entry, kind), getattr(digest, kind)
        if expected != got:
            return f"{entry.path}: content changed: expected {kind} {expected}, got {got}"
    return None


def _pack_problems(manifest: Manifest, present: set[str]) -> Iterator[str]:
    """What a pack's header says against the manifest; only packs whose files are otherwise sound."""
    model = manifest.model
    for layer, expert in manifest.experts.items():
        if expert.file not in present:
            continue
        try:
            header = read_pack_header(manifest.root / expert.file)
        except InvalidInputError as error:
            yield f"{expert.file}: {error}"
            continue
        expected = {
            "layer": layer,
            "num_experts": model.n_routed_experts,
            "hidden_size": model.hidden_size,
            "moe_intermediate_size": model.moe_intermediate_size,
        }
        for key, value in expected.items():
            if getattr(header, key) != value:
                yield f"{expert.file}: {key}: expected {value} by bundle.json, got {getattr(header, key)}"
        if header.formats != (expert.formats or (expert.format,) * header.num_experts):
            got = ", ".join(sorted(set(header.formats)))
            yield f"{expert.file}: format: expected {', '.join(expert.names)} by bundle.json, got {got}"


def _shard_problems(manifest: Manifest, present: set[str]) -> Iterator[str]:
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
    for base in manifest.linears:
        spec = specs.get(f"{base}.weight")
        if spec is None or not spec.role.is_linear:
            yield f"linears: {base} is no linear of this model"
    for spec in specs.values():
        base = spec.name.removesuffix(".weight")
        format_name = manifest.linears.get(base)
        if format_name in (None, "bf16"):
            yield from _whole_tensor_problems(spec, checkpoint)
            continue
        for part in PARTS[format_name]:
            if f"{base}.{part}" not in checkpoint:
                yield f"shards/: {format_name} linear {base} has no tensor {base}.{part}"


def _whole_tensor_problems(spec: TensorSpec, checkpoint: Checkpoint) -> Iterator[str]:
    if spec.name not in checkpoint:
        yield f"shards/: tensor {spec.name} is missing"
    elif checkpoint.info(spec.name).shape != spec.shape:
        got = list(checkpoint.info(spec.name).shape)
        yield f"shards/: tensor {spec.name}: expected shape {list(spec.shape)}, got {got}"
