"""The local cache of the hub that all programs share (HF_HOME): models--org--name/{refs,blobs,snapshots}/.

A pull puts real files into snapshots/COMMIT/, where other programs put links into blobs/: then a snapshot is
an ordinary bundle. A snapshot is found by refs/REVISION, which is written when it is whole.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from kttools.bundle.atomic import atomic_write_bytes
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.manifest import MANIFEST_NAME, presence_problem, read_manifest

from .client import Hub, RemoteFile
from .pull import STATE_NAME, Puller

COMMIT = re.compile("[0-9a-f]{40,64}")
MAX_INDEX_BYTES = 100_000_000


def cached_snapshot(repo_id: str, revision: str | None = None, must_be_whole: bool = True) -> Path | None:
    """The snapshot of a revision in the cache, or None; asks nobody. must_be_whole: see is_whole()."""
    repository = repository_dir(repo_id)
    name = revision or constants.DEFAULT_REVISION
    commit = name
    if not COMMIT.fullmatch(name):
        with contextlib.suppress(OSError, ValueError):
            commit = (repository / "refs" / name).read_text(encoding="ascii").strip()
    snapshot = repository / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    return snapshot if not must_be_whole or is_whole(snapshot) else None


def is_whole(snapshot: Path) -> bool:
    """Whether every file is there that the manifest or the index names; without either, any weights."""
    if (snapshot / STATE_NAME).exists():
        return False
    if (snapshot / MANIFEST_NAME).is_file():
        try:
            manifest = read_manifest(snapshot)
        except InvalidInputError:
            return True  # damaged: whoever opens it says how
        return not any(presence_problem(snapshot, entry) for entry in manifest.files.values())
    weights = [*snapshot.glob("*.safetensors"), *snapshot.glob("*.gguf")]
    return bool(weights) and all(_has_indexed(index) for index in snapshot.glob("*.safetensors.index.json"))


def cache_puller(repo_id: str, revision: str | None = None) -> Puller:
    """A pull into the cache; files of other snapshots of the repository are linked, not fetched."""
    hub = Hub(repo_id, revision)
    repository = repository_dir(repo_id)
    target = repository / "snapshots" / hub.commit

    def relatives(file: RemoteFile) -> Sequence[Path]:
        blob = repository / "blobs" / (file.sha256 or file.git_sha1 or "none")
        others = sorted((repository / "snapshots").glob(f"*/{file.path}"))
        return [path for path in (blob, *others) if path.is_file()]

    return Puller(hub, target, is_forced=True, relatives=relatives)


def note_revision(hub: Hub) -> None:
    """Lets refs/ point at the snapshot that was pulled. Raises KTError when it cannot be written."""
    if hub.revision == hub.commit:
        return
    file = repository_dir(hub.repo_id) / "refs" / hub.revision
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(file, hub.commit.encode("ascii"))


def repository_dir(repo_id: str) -> Path:
    """Where the cache keeps a model repository; need not exist."""
    return Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


def _has_indexed(index: Path) -> bool:
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            return True
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return True  # damaged: whoever opens it says how
    return all(isinstance(name, str) and (index.parent / name).is_file() for name in names)
