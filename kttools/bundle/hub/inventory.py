"""What belongs to a model in a hub repository: a bundle by its manifest, a checkpoint by its file names."""

import re
from dataclasses import dataclass
from pathlib import Path

from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, SIGNATURE_NAME, parse_manifest

from .client import Hub, RemoteFile

MAX_SIGNATURE_BYTES = 1 << 20
# What a checkpoint needs to be quantised. Pickles and other programs' weights stay where they are.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
CHECKPOINT_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True, slots=True)
class Inventory:
    """Files to have. manifest: bytes of bundle.json, None for a checkpoint; detached: its signature."""

    files: tuple[RemoteFile, ...]
    manifest: bytes | None = None
    detached: tuple[RemoteFile, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in (*self.files, *self.detached)) + len(self.manifest or b"")

    @property
    def count(self) -> int:
        return len(self.files) + len(self.detached) + (self.manifest is not None)


def read_inventory(hub: Hub) -> Inventory:
    """Looks at the repository; downloads no more than its manifest.

    Raises DownloadError, InvalidInputError for a repository without a model that kttools can read, and
    CorruptFileError when the manifest is damaged or lists what the repository does not have.
    """
    listed = hub.files()
    if MANIFEST_NAME in listed:
        return _bundle(hub, listed)
    files = [f for path, f in sorted(listed.items()) if _is_checkpoint_file(path)]
    if not any(file.path.endswith(".safetensors") for file in files):
        raise InvalidInputError(
            f"{hub}: holds no bundle and no safetensors checkpoint; fetch the file you want, such as a GGUF, "
            "and give its path"
        )
    return Inventory(tuple(files))


def _bundle(hub: Hub, listed: dict[str, RemoteFile]) -> Inventory:
    data = hub.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    manifest = parse_manifest(data, Path(hub.repo_id))
    files = []
    for entry in manifest.files.values():
        file = RemoteFile(entry.path, entry.bytes, sha256=entry.sha256)
        _check_listed(hub, file, listed.get(entry.path))
        files.append(file)
    signature = listed.get(SIGNATURE_NAME)
    if signature is not None and signature.bytes > MAX_SIGNATURE_BYTES:
        raise CorruptFileError(f"{hub}: {SIGNATURE_NAME}: {signature.bytes} bytes are no signature")
    return Inventory(tuple(files), data, () if signature is None else (signature,))


def _check_listed(hub: Hub, file: RemoteFile, found: RemoteFile | None) -> None:
    """What the repository's listing already says against the manifest, before a byte is fetched."""
    if found is None:
        raise CorruptFileError(f"{hub}: {file.path}: listed in {MANIFEST_NAME} but not in the repository")
    if found.bytes != file.bytes:
        raise CorruptFileError(
            f"{hub}: {file.path}: expected {file.bytes} bytes by {MANIFEST_NAME}, the repository has "
            f"{found.bytes}"
        )
    if found.sha256 is not None and found.sha256 != file.sha256:
        raise CorruptFileError(
            f"{hub}: {file.path}: expected sha256 {file.sha256} by {MANIFEST_NAME}, the repository has "
            f"{found.sha256}"
        )


def _is_checkpoint_file(path: str) -> bool:
    return bool(PLAIN_NAME.fullmatch(path)) and path.endswith(CHECKPOINT_SUFFIXES)
