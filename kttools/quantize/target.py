"""The directory quantize writes: whose it is, a lock, and the records that let a cut-off run continue.

While a bundle is being made it holds `.quantize/`: job.json with the fingerprint of source and recipe, and a
record for every finished file. A record is written after its file has its final name; so whatever moment the
process dies at, a record means a whole file. The directory is removed when bundle.json stands.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from kttools.bundle.atomic import TEMPORARY_SUFFIX, atomic_write_bytes, translate_oserror
from kttools.bundle.hashing import FileDigest, digest_file
from kttools.bundle.model_card import CARD_FOLDER, find_model_card
from kttools_runtime import strict_json
from kttools_runtime.errors import InvalidInputError, KTError, UsageError
from kttools_runtime.manifest import MANIFEST_NAME
from kttools_runtime.version import __version__

from .plan import Plan
from .report import REPORT_NAME, TensorError

STATE_NAME = ".quantize"
JOB_NAME = "job.json"
# What quantize writes, and the only files --force removes.
OWN_FILES = (
    REPORT_NAME,
    "experts/layer-*.ktpack",
    "shards/model-*.safetensors",
    "shards/model.safetensors.index.json",
    "tokenizer/*.json",
    "tokenizer/*.jinja",
    f"{CARD_FOLDER}/*",
)
OWN_FOLDERS = ("experts", "shards", "tokenizer")


class State(Enum):
    """What a target directory is before quantize touches it."""

    FRESH = "fresh"
    UNFINISHED = "unfinished"
    OTHER_JOB = "other job"
    FINISHED = "finished"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class Finished:
    """The record of a finished file: its hashes, and the errors of the matrices in it."""

    digest: FileDigest
    errors: tuple[TensorError, ...]


class Target:
    """One bundle directory and the job (source and recipe) that is to fill it."""

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.root = root
        self.fingerprint = fingerprint
        self._state = root / STATE_NAME

    def state(self) -> State:
        """Looks, changes nothing. Raises KTError when the target is no directory or cannot be read."""
        try:
            if not self.root.is_dir():
                if self.root.exists() or self.root.is_symlink():
                    raise UsageError(f"{self.root}: exists and is not a directory")
                return State.FRESH
            names = {entry.name for entry in self.root.iterdir()}
        except OSError as error:
            raise translate_oserror(error, self.root) from error
        if MANIFEST_NAME in names:
            return State.FINISHED
        if (self._state / JOB_NAME).exists():
            return State.UNFINISHED if self._job() == self.fingerprint else State.OTHER_JOB
        return State.FOREIGN if names - {STATE_NAME} else State.FRESH

    def check(self, is_forced: bool) -> State:
        """The state, or UsageError when going on would need --force and it was not given."""
        state = self.state()
        problems = {
            State.FINISHED: "already holds a bundle; choose another -o, or --force to replace it",
            State.OTHER_JOB: "holds an unfinished bundle of another source, recipe or version; "
            "finish it with those, or --force to start over",
            State.FOREIGN: "is not empty and holds no bundle; choose another -o, or --force to write into it",
        }
        if state in problems and not is_forced:
            raise UsageError(f"{self.root}: {problems[state]}")
        return state

    def own_files(self) -> list[Path]:
        """Existing files that a forced start removes."""
        return [path for pattern in OWN_FILES for path in sorted(self.root.glob(pattern)) if path.is_file()]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directory and holds it for this process; KTError when another one has it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise translate_oserror(error, self.root) from error
        try:
            self._lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise KTError(f"{self.root}: another process is writing this bundle; wait for it") from None
            raise translate_oserror(error, self.root) from error

    def begin(self, is_forced: bool) -> None:
        """Under the lock: refuses what is there, or records the job and then clears what is not of it.

        The job comes before all else, so that a run killed here is continued and not taken for foreign.
        """
        state = self.check(is_forced)
        try:
            if state is not State.UNFINISHED:
                (self.root / MANIFEST_NAME).unlink(missing_ok=True)
                shutil.rmtree(self._state, ignore_errors=True)
                self._state.mkdir()
                job = strict_json.canonical({"fingerprint": self.fingerprint})
                atomic_write_bytes(self._state / JOB_NAME, job)
            self._clear()
        except OSError as error:
            raise translate_oserror(error, self.root) from error

    def end(self) -> None:
        """Forgets the job; the bundle stands."""
        shutil.rmtree(self._state, ignore_errors=True)

    def record(self, path: str, errors: tuple[TensorError, ...] = ()) -> Finished:
        """Hashes a file that has its final name, and remembers it."""
        file = self.root / path
        digest = digest_file(file)
        document = {
            "path": path,
            "mtime_ns": file.stat().st_mtime_ns,
            "bytes": digest.bytes,
            "xxh3_128": digest.xxh3_128,
            "sha256": digest.sha256,
            "errors": [error.to_dict() for error in errors],
        }
        atomic_write_bytes(self._record_file(path), strict_json.canonical(document))
        return Finished(digest, errors)

    def finished(self, path: str) -> Finished | None:
        """The record of a file that is still what it was, else None. Another mtime: it is hashed again."""
        try:
            document = strict_json.read_object(self._record_file(path))
            status = (self.root / path).stat()
            digest = FileDigest(document["bytes"], document["xxh3_128"], document["sha256"])
            errors = tuple(TensorError.from_dict(error) for error in document["errors"])
        except (InvalidInputError, OSError, KeyError, TypeError):
            return None
        if document["path"] != path or status.st_size != digest.bytes:
            return None
        is_same = status.st_mtime_ns == document["mtime_ns"] or digest_file(self.root / path) == digest
        return Finished(digest, errors) if is_same else None

    def _job(self) -> Any:
        try:
            return strict_json.read_object(self._state / JOB_NAME).get("fingerprint")
        except InvalidInputError:
            return None

    def _record_file(self, path: str) -> Path:
        return self._state / (path.replace("/", "--") + ".json")

    def _clear(self) -> None:
        """Removes cut-off writes and files without a record: another bundle's, or of a killed run."""
        for folder in OWN_FOLDERS:
            (self.root / folder).mkdir(exist_ok=True)
        for folder in (*OWN_FOLDERS, CARD_FOLDER):
            for leftover in (self.root / folder).glob(f".*{TEMPORARY_SUFFIX}"):
                leftover.unlink()
        for file in self.own_files():
            if not self._record_file(file.relative_to(self.root).as_posix()).exists():
                file.unlink()


def fingerprint(plan: Plan) -> str:
    """Hex digest of source files (name, size, time), recipe, program version and everything planned."""
    files = [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in _inputs(plan)]
    document = {
        "version": __version__,
        "source": str(plan.source.path.resolve()),
        "files": files,
        "recipe": plan.recipe.to_dict(),
        "model": plan.source.config.to_dict(),
        "packs": [(pack.path, pack.bytes) for pack in plan.packs],
        "shards": [(shard.name, hashlib.sha256(shard.header).hexdigest()) for shard in plan.shards],
    }
    return hashlib.sha256(strict_json.canonical(document)).hexdigest()


def _inputs(plan: Plan) -> list[Path]:
    card = find_model_card(plan.source.card_dir).files
    return [*plan.source.files, *plan.source.tokenizer_files.values(), *card.values()]
