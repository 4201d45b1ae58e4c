"""A bundle onto the hub in one commit: only contents that the repository lacks are sent."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import disable_progress_bars

from kttools.bundle.render import size
from kttools_runtime.errors import CorruptFileError, DownloadError, InvalidInputError
from kttools_runtime.manifest import MANIFEST_NAME, SIGNATURE_NAME, presence_problem, read_manifest

from .client import Hub, RemoteFile
from .fetch import matches


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What a push would send: paths in the bundle, in the order of sending."""

    repo_id: str
    bundle: Path
    exists: bool
    send: tuple[RemoteFile, ...]
    kept_files: int

    @property
    def send_bytes(self) -> int:
        return sum(file.bytes for file in self.send)

    def line(self) -> str:
        """For people."""
        where = self.repo_id if self.exists else f"{self.repo_id} (a new repository)"
        kept = f"; {self.kept_files} files are there already" if self.kept_files else ""
        return f"{self.bundle}: send {len(self.send)} files, {size(self.send_bytes)}, to {where}{kept}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "repo_id": self.repo_id,
            "bundle": str(self.bundle),
            "is_new": not self.exists,
            "send_files": len(self.send),
            "send_bytes": self.send_bytes,
            "kept_files": self.kept_files,
        }


class Pusher:
    """One push: plan(), then run(). Raises KTError and its subclasses.

    An interrupted push leaves the repository as it was; contents that had arrived are not sent again.
    """

    def __init__(self, hub: Hub, bundle: Path, is_private: bool = False) -> None:
        self.hub, self.bundle, self.is_private = hub, bundle, is_private

    def plan(self) -> PushPlan:
        """Compares the manifest with the repository's listing; reads small files only."""
        listed = self._listed()
        wanted = self._local_files()
        send = tuple(file for file in wanted if not self._is_there(file, (listed or {}).get(file.path)))
        return PushPlan(self.hub.repo_id, self.bundle, listed is not None, send, len(wanted) - len(send))

    def run(self, plan: PushPlan, on_bytes: Callable[[int], object] = lambda count: None) -> str:
        """Sends the files one after another, then commits; returns the commit.

        on_bytes: bytes that are on the hub. Raises CorruptFileError before anything is sent when a file is
        not what the manifest says.
        """
        for file in plan.send:
            if not matches(self.bundle / file.path, file):
                raise CorruptFileError(f"{self.bundle / file.path}: content changed; run kttools verify")
        disable_progress_bars()  # theirs; the caller shows ours
        api, repo_id, revision = self.hub.api, self.hub.repo_id, self.hub.revision
        with self.hub.translated(), _plain_errors(str(self.hub)):
            api.create_repo(repo_id, private=self.is_private or None, exist_ok=True)
            additions = []
            for file in plan.send:
                addition = CommitOperationAdd(file.path, str(self.bundle / file.path))
                # One at a time: an interrupted push has whole files on the hub and goes on after them.
                api.preupload_lfs_files(repo_id, [addition], revision=revision, free_memory=False)
                on_bytes(file.bytes)
                additions.append(addition)
            if not additions:
                return self.hub.commit
            message = f"Upload {self.bundle.resolve().name} with kttools"
            done = api.create_commit(repo_id, additions, commit_message=message, revision=revision)
        return str(done.oid)

    def _listed(self) -> dict[str, RemoteFile] | None:
        """What the repository has; None when there is no such repository (or none that may be seen)."""
        try:
            return self.hub.files()
        except DownloadError as error:
            if isinstance(error.__cause__, hub_errors.RevisionNotFoundError):
                raise
            if isinstance(error.__cause__, hub_errors.RepositoryNotFoundError):
                return None
            raise

    def _local_files(self) -> list[RemoteFile]:
        """What the manifest lists, its signature, and itself at the end."""
        manifest = read_manifest(self.bundle)
        for entry in manifest.files.values():
            problem = presence_problem(self.bundle, entry)
            if problem:
                raise CorruptFileError(f"{self.bundle / entry.path}: {problem}; run kttools verify")
        files = [RemoteFile(e.path, e.bytes, sha256=e.sha256) for e in manifest.files.values()]
        own = [name for name in (SIGNATURE_NAME, MANIFEST_NAME) if (self.bundle / name).is_file()]
        return [*files, *(self._read(name) for name in own)]

    def _read(self, name: str) -> RemoteFile:
        try:
            data = (self.bundle / name).read_bytes()
        except OSError as error:
            raise InvalidInputError(f"{self.bundle / name}: cannot be read: {error.strerror}") from error
        return RemoteFile(name, len(data), sha256=hashlib.sha256(data).hexdigest())

    def _is_there(self, file: RemoteFile, found: RemoteFile | None) -> bool:
        if found is None or found.bytes != file.bytes:
            return False
        if found.sha256 is not None:
            return found.sha256 == file.sha256
        return matches(self.bundle / file.path, found)


@contextlib.contextmanager
def _plain_errors(where: str) -> Iterator[None]:
    """What huggingface_hub raises for a failed upload besides HTTP errors, as DownloadError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        raise DownloadError(f"{where}: the upload failed: {cause}; run again to continue") from error
