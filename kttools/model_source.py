"""What the user calls MODEL, found on disk: a bundle, a checkpoint, GGUF files, or a hub id in the cache."""

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kttools_runtime.errors import DownloadError, InvalidInputError

from .dirs import cache_dir

if TYPE_CHECKING:
    from .families import SourceModel

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
MANIFEST = "bundle.json"
CONFIG = "config.json"
GGUF_SUFFIX = ".gguf"
SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
SMALL_FILE_BYTES = 16 << 20  # up to here a fingerprint covers the content, beyond it the head and the tail
EDGE_BYTES = 1 << 20


def resolve_model(text: str, may_fetch: bool = True) -> Path:
    """The directory or GGUF file MODEL names. Raises InvalidInputError or DownloadError.

    may_fetch: a hub id that is not in the local cache is pulled, if the user agrees (see on_demand); and a
    bundle must bear the signature that the user's configuration asks for.
    """
    path = _find_model(text, may_fetch)
    if may_fetch and is_bundle(path):
        from .trust_options import check_configured

        check_configured(path)
    return path


def _find_model(text: str, may_fetch: bool) -> Path:
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return _directory_of(path)
    if HUB_ID.fullmatch(text) and not path.parent.is_dir():
        return _hub_snapshot(text, may_fetch)
    raise InvalidInputError(f"{text}: no such file or directory, and not a hub id (org/name)")


def is_bundle(path: Path) -> bool:
    """True when the directory holds a manifest."""
    return (path / MANIFEST).is_file()


def is_checkpoint(path: Path) -> bool:
    """True when it looks like a Hugging Face checkpoint, or like GGUF (a file, or a directory of them)."""
    if path.suffix == GGUF_SUFFIX and path.is_file():
        return True
    return not is_bundle(path) and ((path / CONFIG).is_file() or any(path.glob(f"*{GGUF_SUFFIX}")))


def ensure_bundle(
    path: Path,
    quantise: Callable[[Path, Path, Path | None], None],
    weights: Path | None = None,
    form: str = "",
) -> Path:
    """A bundle for path: itself, or its form in the cache, made by quantise(source, target, weights).

    weights: GGUF that replaces the weights of path. form: a name for formats other than the default ones. Two
    processes that want the same bundle wait for each other.
    """
    if is_bundle(path) and weights is None:
        return path
    if not is_checkpoint(path):
        raise InvalidInputError(
            f"{path}: neither a bundle ({MANIFEST}) nor a checkpoint ({CONFIG}, {GGUF_SUFFIX})"
        )
    mark = fingerprint(path) if weights is None else _combined(fingerprint(path), fingerprint(weights))
    target = cache_dir() / "bundles" / f"{_plain_name(weights or path)}-{mark[:16]}{form and f'-{form}'}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(target.name + ".lock")):
        if not is_bundle(target):
            quantise(path, target, weights)
    return target


def open_source(text: str) -> "SourceModel":
    """MODEL as a source of tensors: a checkpoint, GGUF, or a bundle (dequantised). Raises KTError."""
    from .bundle.source import open_bundle
    from .families import open_model

    path = resolve_model(text)
    return open_bundle(path) if is_bundle(path) else open_model(path)


def fingerprint(checkpoint: Path) -> str:
    """Hex digest of a checkpoint's place and content: names and sizes of its files, bytes of the small
    ones, of the large ones the first and last MiB and the modification time."""
    digest = hashlib.sha256(str(checkpoint.resolve()).encode())
    for file in _files_of(checkpoint):
        status = file.stat()
        digest.update(f"\0{file.name}\0{status.st_size}\0".encode())
        with file.open("rb") as stream:
            if status.st_size <= SMALL_FILE_BYTES:
                digest.update(stream.read())
                continue
            digest.update(f"{status.st_mtime_ns}\0".encode())
            digest.update(stream.read(EDGE_BYTES))
            stream.seek(-EDGE_BYTES, os.SEEK_END)
            digest.update(stream.read())
    return digest.hexdigest()


def _files_of(checkpoint: Path) -> list[Path]:
    """A directory's files, or a GGUF file with its splits (every file of the same name but the number)."""
    if checkpoint.is_dir():
        return sorted(p for p in checkpoint.iterdir() if p.is_file() and not p.name.startswith("."))
    match = SPLIT.fullmatch(checkpoint.name)
    if match is None:
        return [checkpoint]
    pattern = re.compile(rf"{re.escape(match[1])}-\d{{5}}-of-{match[2]}\.gguf")
    return sorted(p for p in checkpoint.parent.iterdir() if pattern.fullmatch(p.name))


def _combined(*marks: str) -> str:
    return hashlib.sha256("\0".join(marks).encode()).hexdigest()


def names_model(file: Path) -> bool:
    """Whether a file's name stands for a model: GGUF, or the manifest or config of a directory."""
    return file.suffix == GGUF_SUFFIX or file.name in (MANIFEST, CONFIG)


def _directory_of(file: Path) -> Path:
    if names_model(file):
        return file if file.suffix == GGUF_SUFFIX else file.parent
    raise InvalidInputError(
        f"{file}: expected a directory (a bundle or a checkpoint) or a {GGUF_SUFFIX} file"
    )


def _hub_snapshot(repo_id: str, may_fetch: bool) -> Path:
    """The newest snapshot of a hub id in the local cache, else what is pulled into it."""
    from .bundle.hub.cache import cached_snapshot

    snapshot = cached_snapshot(repo_id, must_be_whole=may_fetch)
    if snapshot is not None:
        return snapshot
    if not may_fetch:
        raise DownloadError(
            f"{repo_id}: not in the local Hugging Face cache (HF_HOME), and not a directory here;"
            f" fetch it first: kttools bundle pull {repo_id}"
        )
    from .on_demand import pull_model

    return pull_model(repo_id)


def _plain_name(path: Path) -> str:
    """A name for the cache: of a hub snapshot its repository, else the directory's own."""
    resolved = path.resolve()
    if resolved.suffix == GGUF_SUFFIX:
        resolved = resolved.with_suffix("")
    if resolved.parent.name == "snapshots":
        resolved = resolved.parent.parent
    return re.sub(r"[^\w.-]+", "-", resolved.name).strip("-.")[:80] or "model"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
