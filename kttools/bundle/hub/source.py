"""Single files of a bundle on the hub, for repair: what is fetched is verified and can be resumed."""

from collections.abc import Callable
from pathlib import Path

from kttools_runtime.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest, parse_manifest

from .client import Hub, RemoteFile
from .fetch import fetch


class HubSource:
    """A bundle in a hub repository. Methods raise DownloadError and CorruptFileError."""

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        self._hub = Hub(repo_id, revision)

    def manifest_bytes(self) -> bytes:
        """bundle.json as the repository has it."""
        return self._hub.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)

    def read_small(self, path: str, max_bytes: int) -> bytes:
        """A small file of the repository, of at most max_bytes."""
        return self._hub.read(path, max_bytes)

    def manifest(self) -> Manifest:
        return parse_manifest(self.manifest_bytes(), Path(self._hub.repo_id))

    def fetch(
        self, entry: FileEntry, part: Path, on_bytes: Callable[[int], object] = lambda count: None
    ) -> None:
        """Completes `part` with the content of `entry`, its SHA-256 checked and flushed to disk.

        Bytes that `part` holds already are not fetched again. The caller renames it.
        """
        fetch(self._hub, RemoteFile(entry.path, entry.bytes, sha256=entry.sha256), part, on_bytes)

    def __str__(self) -> str:
        return str(self._hub)
