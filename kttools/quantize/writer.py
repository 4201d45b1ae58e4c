"""From a checkpoint to a bundle: packs, shards, tokenizer, report, and the manifest last."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kttools.bundle.atomic import atomic_write_bytes
from kttools.bundle.fingerprint import bundle_fingerprint
from kttools.bundle.hashing import FileDigest, sha256_file
from kttools.bundle.manifest import write_manifest
from kttools.bundle.model_card import MAX_CARD_BYTES, find_model_card
from kttools_runtime.errors import InvalidInputError, UsageError
from kttools_runtime.manifest import ExpertFile, Manifest
from kttools_runtime.pack_writer import PackWriter
from kttools_runtime.strict_json import read_bounded

from .convert import Rows, convert_expert, convert_rows, split_rows
from .plan import PackPlan, Plan, Resources, find_resources
from .report import REPORT_NAME, ErrorSums, TensorError, report_bytes
from .shard_layout import INDEX_NAME, ShardFile
from .shard_writer import ShardWriter, open_shard
from .target import Finished, State, Target, fingerprint

MAX_TOKENIZER_FILE_BYTES = 1 << 30
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What quantize did. kept_files: finished by an earlier run; errors: of every matrix, packs first."""

    manifest: Manifest
    errors: list[TensorError]
    written_files: int
    kept_files: int
    seconds: float


class Quantizer:
    """One run: look (resources), then work (run). Raises KTError and its subclasses."""

    def __init__(self, plan: Plan, target: Path, is_forced: bool = False) -> None:
        if target.resolve() == plan.source.path.resolve():
            raise UsageError(f"{target}: is the source; choose another -o")
        self.plan = plan
        self.is_forced = is_forced
        self.target = Target(target, fingerprint(plan))
        self._finished: dict[str, Finished] = {}
        self._kept = 0
        self._on_bytes: Callable[[int], object] = _ignore

    def resources(self) -> Resources:
        """What there is and what is needed, with what an earlier run finished or --force would free."""
        state = self.target.check(self.is_forced)
        finished = replaced = 0
        if state is State.UNFINISHED:
            files = [self.target.root / path for path in self._paths()]
            finished = sum(file.stat().st_size for file in files if file.is_file())
        elif state is not State.FRESH:
            replaced = sum(file.stat().st_size for file in self.target.own_files())
        return find_resources(self.target.root, finished, replaced)

    def run(
        self,
        on_start: Callable[[int], object] | None = None,
        on_bytes: Callable[[int], object] | None = None,
    ) -> Outcome:
        """Writes the bundle. on_start: bytes to work through; on_bytes: each piece, from any thread."""
        started = time.monotonic()
        self._on_bytes = on_bytes or _ignore
        self.target.check(self.is_forced)
        with self.target.locked():
            self.target.begin(self.is_forced)
            self._take_finished()
            if on_start:
                on_start(self._remaining_bytes())
            with ThreadPoolExecutor(self.plan.workers, "quantize") as pool:
                self._write_packs(pool)
                self._write_shards(pool)
                source_files = self._hash_source(pool)
            manifest, errors = self._write_rest(source_files)
            self.target.end()
        seconds = time.monotonic() - started
        return Outcome(manifest, errors, len(self._paths()) - self._kept, self._kept, seconds)

    def _paths(self) -> list[str]:
        """Packs and shards: the files that are work."""
        return [pack.path for pack in self.plan.packs] + [f"shards/{s.name}" for s in self.plan.shards]

    def _take_finished(self) -> None:
        for path in self._paths():
            finished = self.target.finished(path)
            if finished:
                self._finished[path] = finished
        self._kept = len(self._finished)

    def _remaining_bytes(self) -> int:
        plan = self.plan
        experts = plan.source.config.n_routed_experts * plan.expert_source_bytes
        packs = sum(experts for pack in plan.packs if pack.path not in self._finished)
        shards = (shard for shard in plan.shards if f"shards/{shard.name}" not in self._finished)
        tensors = sum(tensor.source.bytes for shard in shards for tensor in shard.tensors)
        return packs + tensors + sum(file.stat().st_size for file in plan.source.files)

    def _write_packs(self, pool: ThreadPoolExecutor) -> None:
        """Layer after layer; a layer is flushed and hashed while the workers are at the next one."""
        sealing: Future[None] | None = None
        for pack in self.plan.packs:
            if pack.path in self._finished:
                continue
            writer, errors = self._fill_pack(pool, pack)
            if sealing:
                sealing.result()
            sealing = pool.submit(self._seal_pack, pack, writer, errors)
        if sealing:
            sealing.result()

    def _fill_pack(
        self, pool: ThreadPoolExecutor, pack: PackPlan
    ) -> tuple[PackWriter, tuple[TensorError, ...]]:
        source = self.plan.source
        writer = PackWriter(
            self.target.root / pack.path,
            layer=pack.layer,
            hidden_size=source.config.hidden_size,
            moe_intermediate_size=source.config.moe_intermediate_size,
            formats=pack.formats,
        )

        def work(expert: int) -> list[TensorError]:
            errors = convert_expert(source, pack, expert, writer)
            self._on_bytes(self.plan.expert_source_bytes)
            return errors

        try:
            found = run_all(pool, work, range(source.config.n_routed_experts))
        except BaseException:
            writer.discard()
            raise
        return writer, tuple(error for errors in found for error in errors)

    def _seal_pack(self, pack: PackPlan, writer: PackWriter, errors: tuple[TensorError, ...]) -> None:
        try:
            writer.finish()
        finally:
            writer.discard()
        self._finished[pack.path] = self.target.record(pack.path, errors)

    def _write_shards(self, pool: ThreadPoolExecutor) -> None:
        for shard in self.plan.shards:
            path = f"shards/{shard.name}"
            if path not in self._finished:
                with open_shard(self.target.root / path, shard) as writer:
                    errors = self._fill_shard(pool, shard, writer)
                self._finished[path] = self.target.record(path, errors)

    def _fill_shard(
        self, pool: ThreadPoolExecutor, shard: ShardFile, writer: ShardWriter
    ) -> tuple[TensorError, ...]:
        plan = self.plan

        def work(rows: Rows) -> ErrorSums:
            sums = convert_rows(plan.source, rows, rows.tensor.group_size, writer)
            self._on_bytes(rows.source_bytes)
            return sums

        pieces = [rows for tensor in shard.tensors for rows in split_rows(tensor)]
        totals: dict[str, ErrorSums] = {}
        for rows, sums in zip(pieces, run_all(pool, work, pieces), strict=True):
            name = rows.tensor.source.name
            totals[name] = totals.get(name, ErrorSums()) + sums
        linears = [(t.source, t.format) for t in shard.tensors if t.format is not None]
        return tuple(
            TensorError.of(source.name, source.role.value, name, source.shape, totals[source.name])
            for source, name in linears
        )

    def _hash_source(self, pool: ThreadPoolExecutor) -> list[dict[str, Any]]:
        """Provenance: every source file by SHA-256. InvalidInputError when one changed meanwhile."""

        def work(file: Path) -> dict[str, Any]:
            digest = sha256_file(file, self._on_bytes)
            return {"path": file.name, "bytes": file.stat().st_size, "sha256": digest}

        files = run_all(pool, work, self.plan.source.files)
        if fingerprint(self.plan) != self.target.fingerprint:
            path = self.plan.source.path
            raise InvalidInputError(f"{path}: files changed while they were read; run again")
        return files

    def _write_rest(self, source_files: list[dict[str, Any]]) -> tuple[Manifest, list[TensorError]]:
        """Index, tokenizer, licence and model card, report, manifest."""
        plan = self.plan
        digests = {path: finished.digest for path, finished in self._finished.items()}
        errors = [error for path in self._paths() for error in self._finished[path].errors]
        digests[f"shards/{INDEX_NAME}"] = self._write_small(f"shards/{INDEX_NAME}", plan.index)
        files = plan.source.tokenizer_files.items()
        copied = {name: read_bounded(file, MAX_TOKENIZER_FILE_BYTES) for name, file in files}
        for name, data in (plan.source.tokenizer_data | copied).items():
            digests[f"tokenizer/{name}"] = self._write_small(f"tokenizer/{name}", data)
        card = find_model_card(plan.source.card_dir)
        for name, file in card.files.items():
            digests[name] = self._write_small(name, read_bounded(file, MAX_CARD_BYTES))
        report = report_bytes(plan.recipe.to_dict(), errors)
        digests[REPORT_NAME] = self._write_small(REPORT_NAME, report)
        tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
        shard_files = [self.target.root / f"shards/{shard.name}" for shard in plan.shards]
        manifest = write_manifest(
            self.target.root,
            config=plan.source.config,
            source_config=plan.source.source_config,
            source_files=source_files,
            recipe=plan.recipe.to_dict(),
            experts={pack.layer: ExpertFile.of(pack.path, pack.formats) for pack in plan.packs},
            linears={tensor.base: tensor.format for tensor in tensors if tensor.format is not None},
            files=digests,
            fingerprint=bundle_fingerprint(plan.source.config, shard_files),
            license=card.license,
            model_card=card.card,
        )
        return manifest, errors

    def _write_small(self, path: str, data: bytes) -> FileDigest:
        (self.target.root / path).parent.mkdir(exist_ok=True)
        atomic_write_bytes(self.target.root / path, data)
        return self.target.record(path).digest


def run_all(pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Results in the order of items. The first error (or Ctrl-C) drops what has not begun and is raised."""
    futures = [pool.submit(work, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def _ignore(_: int) -> None:
    return None
