"""One repository of the hub at one commit: its files, and their bytes from any offset on.

huggingface_hub supplies the endpoint (HF_ENDPOINT), the token (HF_TOKEN), offline mode (HF_HUB_OFFLINE), the
session and the listing. Its own downloads are not used: in version 2 a cut-off file is removed and begins
again, and a layer of a large model is 11 GB.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from kttools_runtime.errors import CorruptFileError, DownloadError
from kttools_runtime.version import __version__

MAX_LISTED_FILES = 100_000
MAX_ERROR_BYTES = 64 << 10
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
RETRIED = (408, 425, 429)
# The base of all errors of the HTTP library beneath huggingface_hub, whose name depends on the version.
HTTPError: type[Exception] = hub_errors.HfHubHTTPError.__mro__[1]


class TransientError(DownloadError):
    """A connection that broke or a server that is busy: worth another try from where it stopped."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file to fetch and what its content must be. git_sha1: the id of a small file's git blob."""

    path: str
    bytes: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def key(self) -> str:
        """A name for the content: equal keys are equal files."""
        return self.sha256 or f"git-{self.git_sha1}"


@dataclass(frozen=True, slots=True)
class Body:
    """What a server sends: chunks from byte `start` of the file on."""

    start: int
    chunks: Iterator[bytes]


class Hub:
    """A model repository, pinned to the commit that `revision` meant when it was first asked."""

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        self.repo_id = repo_id
        self.revision = revision or constants.DEFAULT_REVISION
        self.api = HfApi(library_name="kttools", library_version=__version__)
        self._commit = ""

    @property
    def commit(self) -> str:
        """The 40 digits of the commit. Raises DownloadError."""
        if not self._commit:
            with self.translated():
                found = self.api.model_info(self.repo_id, revision=self.revision).sha
            if not found or not re.fullmatch("[0-9a-f]{40,64}", found):
                raise DownloadError(f"{self}: the hub names no commit, got {found!r:.80}")
            self._commit = found
        return self._commit

    def files(self) -> dict[str, RemoteFile]:
        """Every file of the commit by path, with the hash its storage knows it by. Raises DownloadError."""
        found: dict[str, RemoteFile] = {}
        commit = self.commit
        with self.translated():
            for entry in self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit):
                if isinstance(entry, RepoFile):
                    found[entry.path] = _remote_file(entry)
                if len(found) > MAX_LISTED_FILES:
                    raise DownloadError(f"{self}: more than {MAX_LISTED_FILES} files")
        return found

    @contextlib.contextmanager
    def open(self, path: str, offset: int = 0, total_bytes: int | None = None) -> Iterator[Body]:
        """The bytes of a file from offset on, or from 0 where the server knows no ranges.

        total_bytes: the file's length, held against what the server says. Raises DownloadError, of which
        TransientError is worth another try, and CorruptFileError for another length.
        """
        url = hf_hub_url(self.repo_id, path, revision=self.commit)
        headers = build_hf_headers(library_name="kttools", library_version=__version__)
        headers["Accept-Encoding"] = "identity"
        if offset:
            headers["Range"] = f"bytes={offset}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with self.translated(path), get_session().stream("GET", url, headers=headers, timeout=timeout) as got:
            if got.status_code >= 400:
                got._content = _bounded(got, MAX_ERROR_BYTES)
            hf_raise_for_status(got)
            start = _start(got, offset, total_bytes, f"{self}: {path}")
            yield Body(
                start, got.iter_bytes()
            )  # as they come: what a chunker holds back is lost with the line

    def read(self, path: str, max_bytes: int) -> bytes:
        """A small file. Raises DownloadError; CorruptFileError when it is larger than max_bytes."""
        data = b""
        with self.open(path) as body:
            for chunk in body.chunks:
                data += chunk
                if len(data) > max_bytes:
                    raise CorruptFileError(f"{self}: {path}: larger than {max_bytes} bytes")
        return data

    @contextlib.contextmanager
    def translated(self, path: str | None = None) -> Iterator[None]:
        """Errors of huggingface_hub and its HTTP library as DownloadError with a remedy."""
        try:
            yield
        except (HTTPError, hub_errors.OfflineModeIsEnabled, hub_errors.HFValidationError) as error:
            raise _explained(error, f"{self}: {path}" if path else str(self)) from error

    def __str__(self) -> str:
        is_default = self.revision == constants.DEFAULT_REVISION
        return self.repo_id if is_default else f"{self.repo_id} (revision {self.revision})"


def _remote_file(entry: RepoFile) -> RemoteFile:
    """LFS files by their SHA-256, all others by their git blob id."""
    if entry.lfs is not None:
        return RemoteFile(entry.path, entry.lfs.size, sha256=entry.lfs.sha256)
    return RemoteFile(entry.path, entry.size, git_sha1=entry.blob_id)


def _start(response: Any, offset: int, total_bytes: int | None, where: str) -> int:
    """First byte of the file in the body. Raises CorruptFileError when the server has another length."""
    length: str | None = response.headers.get("Content-Length")
    start, total = 0, length
    if response.status_code == 206:
        match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != offset:
            raise TransientError(f"{where}: asked for bytes from {offset}, got another range")
        start, total = offset, match[3]
    if total_bytes is not None and total is not None and total.isdigit() and int(total) != total_bytes:
        raise CorruptFileError(f"{where}: expected {total_bytes} bytes, the hub has {total}")
    return start


def _bounded(response: Any, limit: int) -> bytes:
    """The beginning of an error's body; all that is shown of it."""
    data = b""
    for chunk in response.iter_bytes():
        data += chunk
        if len(data) >= limit:
            break
    return data[:limit]


def _explained(error: Exception, where: str) -> DownloadError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return DownloadError(f"{where}: not here, and HF_HUB_OFFLINE is set; unset it to download")
    if isinstance(error, hub_errors.HFValidationError):
        return DownloadError(f"{where}: not a hub id: {error}")
    if isinstance(error, hub_errors.GatedRepoError):
        return DownloadError(f"{where}: gated; accept its conditions on the hub and set HF_TOKEN")
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return DownloadError(f"{where}: the hub has no such revision")
    if isinstance(error, hub_errors.EntryNotFoundError):
        return DownloadError(f"{where}: the hub has no such file")
    if isinstance(error, hub_errors.RepositoryNotFoundError) or status == 404:
        return DownloadError(f"{where}: not on the hub, or private; check the name, or set HF_TOKEN")
    if status in (401, 403):
        return DownloadError(f"{where}: the hub refuses (HTTP {status}); set an HF_TOKEN that may do this")
    if status is None:
        endpoint, what = constants.ENDPOINT, str(error) or type(error).__name__
        return TransientError(f"{where}: cannot be reached at {endpoint}: {what}; run again to continue")
    kind = TransientError if status >= 500 or status in RETRIED else DownloadError
    return kind(f"{where}: the hub answers HTTP {status}; run again later to continue")
