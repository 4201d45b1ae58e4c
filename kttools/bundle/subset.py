"""Cuts a part out of a bundle into a new one: packs of some layers, or some experts of every pack."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kttools_runtime.errors import CorruptFileError, UsageError
from kttools_runtime.manifest import MANIFEST_NAME, FileEntry, Manifest, presence_problem, read_manifest
from kttools_runtime.pack import read_pack_header
from kttools_runtime.pack_writer import PackWriter

from .archive.layout import FRAME_BYTES
from .archive.pack import read_region
from .archive.staging import StagedFile, Staging
from .hashing import FileDigest, StreamingDigest, digest_file
from .selection import Selection, choose, chosen_experts, chosen_files, subset_manifest

OnBytes = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Cut:
    """What subset made."""

    target: Path
    of: str
    layers: tuple[int, ...]
    experts: int
    files: int
    bytes: int


class Cutter:
    """One part of one bundle, into the new folder `target`; nothing stands there until it is whole.

    Raises UsageError (nothing would be left out, or the target exists), CorruptFileError (the bundle is
    damaged), ResourceError (no space).
    """

    def __init__(
        self, bundle: Path, target: Path, layers: str | None, experts: str | None, node: str | None
    ) -> None:
        self.manifest: Manifest = read_manifest(bundle)
        self.selection: Selection = choose(self.manifest, layers, experts, node)
        if self.selection == Selection():
            raise UsageError("nothing would be left out: give some of the layers or of the experts")
        self.packs = chosen_experts(self.manifest, self.selection)
        self.paths = chosen_files(self.manifest, self.selection)
        self.staging = Staging(target)

    @property
    def total_bytes(self) -> int:
        """To read."""
        return sum(self.manifest.files[path].bytes for path in self.paths)

    def run(self, on_bytes: OnBytes = lambda _: None) -> Cut:
        self._check()
        with self.staging.held(self.paths):
            self.staging.check_target()
            changed = {}
            layers = {pack.file: layer for layer, pack in self.packs.items()}
            for path in self.paths:
                if path in layers and self.selection.experts is not None:
                    changed[path] = self._cut_pack(layers[path], self.selection.experts)
                    on_bytes(self.manifest.files[path].bytes)
                else:
                    self._copy(self.manifest.files[path], on_bytes)
            data = subset_manifest(self.manifest, self.selection, changed)
            self.staging.write_small(MANIFEST_NAME, data)
            self.staging.finish()
        return self._report()

    def _report(self) -> Cut:
        made = read_manifest(self.staging.target)
        total = sum(entry.bytes for entry in made.files.values())
        of = made.subset.of if made.subset else ""
        return Cut(made.root, of, tuple(sorted(made.experts)), made.pack_experts, len(made.files) + 1, total)

    def _check(self) -> None:
        root = self.manifest.root
        for path in self.paths:
            problem = presence_problem(root, self.manifest.files[path])
            if problem:
                raise CorruptFileError(f"{root / path}: {problem}; run kttools verify")
        self.staging.check_target()
        needed = max(0, self._written_bytes() - self.staging.allocated_bytes(self.paths))
        self.staging.check_space(needed)

    def _written_bytes(self) -> int:
        if self.selection.experts is None:
            return self.total_bytes
        files = {pack.file for pack in self.packs.values()}
        packs = sum(self.manifest.files[path].bytes for path in files)
        share = len(self.selection.experts) / self.manifest.model.n_routed_experts
        return self.total_bytes - packs + int(packs * share)

    def _copy(self, entry: FileEntry, on_bytes: OnBytes) -> None:
        """A file whole, checked on the way. What an earlier run copied is read again, not written."""
        source = self.manifest.root / entry.path
        file = StagedFile(self.staging.root / entry.path, entry.bytes)
        digest = StreamingDigest()
        try:
            for offset in range(0, entry.bytes, FRAME_BYTES):
                data = read_region(source, offset, min(FRAME_BYTES, entry.bytes - offset))
                digest.update(data)
                if not file.is_resumed or file.read(offset, len(data)) != data:
                    file.write(offset, data)
                on_bytes(len(data))
            if digest.finish().sha256 != entry.sha256:
                raise CorruptFileError(f"{source}: content changed; run kttools verify")
        finally:
            file.close()

    def _cut_pack(self, layer: int, experts: tuple[int, ...]) -> FileDigest:
        """A pack of some experts of one: blobs as they are, checked by their own checksums."""
        source = self.manifest.root / self.packs[layer].file
        header = read_pack_header(source)
        target = self.staging.root / self.packs[layer].file
        with PackWriter(
            target,
            layer=layer,
            hidden_size=header.hidden_size,
            moe_intermediate_size=header.moe_intermediate_size,
            formats=[header.formats[expert] for expert in experts],
        ) as writer:
            for place, expert in enumerate(experts):
                entry = header.experts[expert]
                blob = read_region(source, entry.offset, entry.bytes)
                if xxhash.xxh3_64_intdigest(blob) != entry.xxh3_64:
                    raise CorruptFileError(f"{source}: expert {expert}: content changed; run kttools verify")
                writer.write(place, blob)
        return digest_file(target)
