"""From the hub into a directory: planned, staged, verified, and named only when everything is there.

While a pull is under way the directory holds `.pull/`: for every file that is missing its content under the
name of its hash, `HASH.part` until it is verified. When the last one is verified they get their final names,
the manifest last. So a process that dies at any moment leaves the old bundle, the new one, or a directory
without a manifest that the next pull completes.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kttools.bundle.atomic import atomic_write_bytes, flush, translate_oserror
from kttools.bundle.lock import hold_directory
from kttools.bundle.render import size
from kttools_runtime.errors import InvalidInputError, ResourceError, UsageError
from kttools_runtime.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURE_NAME,
    FileEntry,
    parse_manifest,
)
from kttools_runtime.strict_json import read_bounded

from .client import Hub, RemoteFile
from .fetch import OnBytes, Stopped, fetch, matches
from .inventory import Inventory, read_inventory

STATE_NAME = ".pull"
REPLACED_NAME = "replaced.json"
PART = ".part"
CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What a pull would do. missing: files to fetch; resumed_bytes: of them already here."""

    repo_id: str
    commit: str
    target: Path
    inventory: Inventory
    missing: tuple[RemoteFile, ...]
    resumed_bytes: int
    free_bytes: int
    is_complete: bool

    @property
    def fetch_bytes(self) -> int:
        """Bytes that will come over the network, each content once."""
        return _content_bytes(self.missing) - self.resumed_bytes

    @property
    def needed_bytes(self) -> int:
        """Bytes of disk that are still to be filled; equal files are stored under each of their names."""
        return sum(file.bytes for file in self.missing) - self.resumed_bytes

    def check(self) -> None:
        """Raises ResourceError when the disk is too small."""
        if self.needed_bytes > self.free_bytes:
            raise ResourceError(
                f"{self.target}: not enough disk: {size(self.needed_bytes)} needed, "
                f"{size(self.free_bytes)} available; free {size(self.needed_bytes - self.free_bytes)} "
                "or choose another -o"
            )

    def line(self) -> str:
        """For people: how much, from where to where."""
        kept = self.inventory.count - len(self.missing) - (self.inventory.manifest is not None)
        notes = [f"{kept} files are here already"] if kept else []
        if self.resumed_bytes:
            notes.append(f"{size(self.resumed_bytes)} from an earlier run")
        note = f" ({'; '.join(notes)})" if notes else ""
        return (
            f"{self.repo_id} at {self.commit[:12]}: fetch {len(self.missing)} files, "
            f"{size(self.fetch_bytes)}{note}, into {self.target} ({size(self.free_bytes)} free)"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "repo_id": self.repo_id,
            "commit": self.commit,
            "target": str(self.target),
            "files": self.inventory.count,
            "bytes": self.inventory.bytes,
            "missing_files": len(self.missing),
            "fetch_bytes": self.fetch_bytes,
            "resumed_bytes": self.resumed_bytes,
            "free_bytes": self.free_bytes,
        }


class Puller:
    """One pull: plan(), then run(). Raises KTError and its subclasses.

    is_forced: write into a directory that holds something else, or replace another bundle. relatives: returns
    local files that may have a content, by the file looked for; each is verified before it is taken.
    """

    def __init__(
        self,
        hub: Hub,
        target: Path,
        is_forced: bool = False,
        relatives: Callable[[RemoteFile], Sequence[Path]] = lambda file: (),
    ) -> None:
        self.hub, self.target, self.is_forced = hub, target, is_forced
        self._relatives = relatives
        self._state = target / STATE_NAME
        self._stop = threading.Event()

    def plan(self) -> PullPlan:
        """Looks at the hub and the target, changes nothing. Raises as run()."""
        return self._plan(read_inventory(self.hub))

    def run(
        self,
        plan: PullPlan,
        on_start: Callable[[int], object] = lambda total: None,
        on_bytes: OnBytes = lambda count: None,
    ) -> PullPlan:
        """Does what the plan says; returns the plan as it was under the lock.

        on_start: bytes to have at the end; on_bytes: bytes had, from any thread.
        """
        plan.check()
        if plan.is_complete:
            return plan
        with hold_directory(self.target):
            plan = self._plan(plan.inventory)
            plan.check()
            if not plan.is_complete:
                with self._os_errors():
                    self._state.mkdir(exist_ok=True)
                    self._prune(plan.missing)
                on_start(_content_bytes(plan.missing))
                self._stage(plan, on_bytes)
                with self._os_errors():
                    self._publish(plan)
        return plan

    def _plan(self, inventory: Inventory) -> PullPlan:
        with self._os_errors():
            is_same = self._check_manifest(inventory)
            known = self._known_files()
            wanted = [*inventory.files, *inventory.detached]
            missing = tuple(file for file in wanted if not self._is_here(file, known))
            if missing and not is_same:
                self._check_foreign()
            resumed = sum(self._staged_bytes(file) for file in _contents(missing))
            free = shutil.disk_usage(_existing(self.target)).free
        is_complete = not missing and (inventory.manifest is None or is_same) and not self._state.exists()
        return PullPlan(
            self.hub.repo_id, self.hub.commit, self.target, inventory, missing, resumed, free, is_complete
        )

    def _check_manifest(self, inventory: Inventory) -> bool:
        """True when this very manifest stands there. Raises UsageError for what needs --force."""
        if self.target.exists() and not self.target.is_dir():
            raise UsageError(f"{self.target}: exists and is not a directory")
        own = self.target / MANIFEST_NAME
        if not own.is_file() or own.read_bytes() == inventory.manifest:
            return own.is_file()
        if not self.is_forced:
            raise UsageError(
                f"{self.target}: already holds another bundle or version; choose another -o, or --force to "
                "replace it"
            )
        return False

    def _check_foreign(self) -> None:
        is_ours = (self.target / MANIFEST_NAME).is_file() or self._state.is_dir() or self.is_forced
        if not is_ours and self.target.is_dir() and any(self.target.iterdir()):
            raise UsageError(
                f"{self.target}: is not empty and holds no unfinished pull; choose another -o, or --force to "
                "write into it (files that are right already are kept)"
            )

    def _known_files(self) -> dict[str, FileEntry]:
        """What a manifest that stands or was just replaced vouches for; nothing when it is damaged."""
        for folder, name in ((self.target, MANIFEST_NAME), (self._state, REPLACED_NAME)):
            if (folder / name).is_file():
                with contextlib.suppress(InvalidInputError):
                    data = read_bounded(folder / name, MAX_MANIFEST_BYTES)
                    return parse_manifest(data, self.target).files
        return {}

    def _is_here(self, file: RemoteFile, known: dict[str, FileEntry]) -> bool:
        """Under its final name. What a manifest vouches for is not read again: `verify` does that."""
        path = self.target / file.path
        if not path.is_file() or path.stat().st_size != file.bytes:
            return False
        entry = known.get(file.path)
        return (entry is not None and entry.sha256 == file.sha256) or matches(path, file)

    def _staged_bytes(self, file: RemoteFile) -> int:
        for name in (file.key, file.key + PART):
            path = self._state / name
            if path.is_file() and path.stat().st_size <= file.bytes:
                return path.stat().st_size
        return 0

    def _prune(self, missing: Sequence[RemoteFile]) -> None:
        """Removes what an earlier pull of another commit left in `.pull/`."""
        wanted = {file.key for file in missing}
        for path in self._state.iterdir():
            if path.name.removesuffix(PART) not in wanted and path.name != REPLACED_NAME:
                path.unlink()

    def _stage(self, plan: PullPlan, on_bytes: OnBytes) -> None:
        """Every missing content, verified, under its hash; several at a time, the largest first."""
        on_bytes(plan.resumed_bytes)
        self._stop.clear()
        files = sorted(_contents(plan.missing), key=lambda file: -file.bytes)
        with ThreadPoolExecutor(CONNECTIONS, "pull") as pool:
            futures = [pool.submit(self._stage_file, file, on_bytes) for file in files]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
                for future in futures:
                    future.cancel()
            wait(futures)
        _raise_first(futures)

    def _stage_file(self, file: RemoteFile, on_bytes: OnBytes) -> None:
        staged = self._state / file.key
        part = staged.with_name(staged.name + PART)
        with self._os_errors():
            if staged.is_file():
                return
            if not part.exists() and self._take_relative(file, staged):
                on_bytes(file.bytes)
                return
            fetch(self.hub, file, part, on_bytes, self._stop.is_set)
            os.replace(part, staged)

    def _take_relative(self, file: RemoteFile, staged: Path) -> bool:
        """Links a local file with that content instead of fetching it."""
        for path in self._relatives(file):
            if matches(path, file):
                with contextlib.suppress(OSError):  # another file system: fetch it
                    os.link(path.resolve(), staged)
                    return True
        return False

    def _publish(self, plan: PullPlan) -> None:
        """Gives the final names. From the first rename to the manifest there is no bundle, and a state."""
        inventory = plan.inventory
        standing = self.target / MANIFEST_NAME
        if standing.is_file() and standing.read_bytes() != inventory.manifest:
            os.replace(standing, self._state / REPLACED_NAME)
        flush(self._state)
        last = {file.key: file for file in plan.missing}
        for file in plan.missing:
            self._name_file(file, last[file.key] is file)
        for folder in {(self.target / file.path).parent for file in plan.missing}:
            flush(folder)
        self._remove_replaced(inventory)
        if inventory.manifest is not None:
            atomic_write_bytes(standing, inventory.manifest)
        shutil.rmtree(self._state)

    def _name_file(self, file: RemoteFile, is_last: bool) -> None:
        staged, final = self._state / file.key, self.target / file.path
        final.parent.mkdir(parents=True, exist_ok=True)
        if not is_last:  # other files have the same content: each gets a copy
            copy = staged.with_name(staged.name + ".copy")
            shutil.copyfile(staged, copy)
            flush(copy)
            staged = copy
        os.replace(staged, final)

    def _remove_replaced(self, inventory: Inventory) -> None:
        """Files that only the replaced bundle listed."""
        if (self._state / REPLACED_NAME).is_file():
            kept = {file.path for file in (*inventory.files, *inventory.detached)}
            for path in {*self._known_files(), SIGNATURE_NAME} - kept:
                (self.target / path).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise translate_oserror(error, self.target) from error


def _contents(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """One file for each content."""
    return list({file.key: file for file in files}.values())


def _content_bytes(files: Sequence[RemoteFile]) -> int:
    return sum(file.bytes for file in _contents(files))


def _existing(path: Path) -> Path:
    """The path or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _raise_first(futures: Sequence[Future[None]]) -> None:
    """The error that stopped the others, rather than their being stopped."""
    errors = [future.exception() for future in futures if not future.cancelled()]
    found = [error for error in errors if error is not None]
    for error in [e for e in found if not isinstance(e, Stopped)] or found:
        raise error
