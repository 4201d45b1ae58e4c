"""Rows of local files and hub data sets through the `datasets` library, streamed, and where they are from."""

import glob
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kttools.bundle.hashing import digest_file
from kttools_runtime.errors import DownloadError, InvalidInputError

from .data_spec import LOCAL_KINDS, DataSpec

COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".lz4")
# What the library and what it reads with raise for broken files.
BROKEN = (ValueError, TypeError, KeyError, OSError, ImportError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, slots=True)
class Row:
    """value: the spec's field, None where the row has none. where: the file or hub id, for messages."""

    id: str
    where: str
    index: int
    value: Any


def read_rows(spec: DataSpec) -> Iterator[Row]:
    """Every row of a spec in order. Raises InvalidInputError or DownloadError, see data.documents."""
    if spec.is_hub:
        dataset, _ = _open_hub(spec)
        yield from _rows(spec, spec.location, spec.location, dataset)
        return
    files = local_files(spec.location)
    for path, name in zip(files, _short_names(files), strict=True):
        yield from _rows(spec, str(path), name, _open_file(spec, path))


def provenance_of(spec: DataSpec) -> dict[str, Any]:
    """JSON-ready. Paths stand as the user wrote them; a licence is known only for hub data sets."""
    head = {"spec": spec.text, "kind": spec.kind, "field": spec.field}
    if spec.is_hub:
        dataset, revision = _open_hub(spec)
        licence = getattr(getattr(dataset, "info", None), "license", None) or None
        origin = {"dataset": spec.location, "config": spec.config, "split": spec.split, "revision": revision}
        return head | origin | {"licence": licence}
    files = local_files(spec.location)
    entries = [_file_entry(spec, path, name) for path, name in zip(files, _short_names(files), strict=True)]
    return head | {"files": entries, "revision": None, "licence": None}


def local_files(location: str) -> list[Path]:
    """The files of a path or glob, sorted by name. Raises InvalidInputError when there is none."""
    # A name that happens to hold [ or * is taken as it stands.
    names = [location] if Path(location).is_file() else sorted(glob.glob(location, recursive=True))
    files = [Path(name) for name in names if Path(name).is_file()]
    if not files:
        what = (
            "is a directory; give its files, for example with /*"
            if Path(location).is_dir()
            else "no such file"
        )
        raise InvalidInputError(f"{location}: {what}")
    return files


def _short_names(files: list[Path]) -> list[str]:
    """File names without their common directory: machine-independent, unique."""
    parent = os.path.commonpath([path.parent.as_posix() or "." for path in files])
    return [Path(os.path.relpath(path, parent)).as_posix() for path in files]


def _file_entry(spec: DataSpec, path: Path, name: str) -> dict[str, Any]:
    digest = digest_file(path)
    rows = sum(1 for _ in _rows(spec, str(path), name, _open_file(spec, path)))
    return {"name": name, "bytes": digest.bytes, "sha256": digest.sha256, "rows": rows}


def _rows(spec: DataSpec, where: str, name: str, dataset: Any) -> Iterator[Row]:
    rows = _translated(where, lambda: iter(dataset))
    index = 0
    while (row := _translated(where, lambda: next(rows, None))) is not None:
        if spec.field not in row:
            found = ", ".join(sorted(map(str, row)))
            raise InvalidInputError(f"{where}: row {index} has no field {spec.field!r}, only {found}")
        yield Row(f"{name}:{index}", where, index, row[spec.field])
        index += 1


def _open_file(spec: DataSpec, path: Path) -> Any:
    import datasets

    # It logs what it raises as well; one line is enough.
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    _check_text(path, spec)
    _check_parquet(path, spec)
    builder, _ = LOCAL_KINDS[spec.kind]
    options = {"sample_by": "document"} if spec.kind == "text" else {}
    # Absolute and escaped, because the library resolves and globs the name again.
    name = glob.escape(str(path.absolute()))
    return _translated(
        str(path),
        lambda: datasets.load_dataset(builder, data_files=[name], split="train", streaming=True, **options),
    )


def _check_text(path: Path, spec: DataSpec) -> None:
    """Text must be UTF-8 and not empty; the library would name neither the file nor the line."""
    if spec.kind not in ("jsonl", "text") or path.suffix in COMPRESSED:
        return
    number = 0
    try:
        with path.open("rb") as lines:
            for line in lines:
                number += 1
                line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{path}: not UTF-8 in line {number} at byte {error.start}; convert the file or remove the line"
        ) from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from error
    if number == 0:
        raise InvalidInputError(f"{path}: the file is empty")


def _check_parquet(path: Path, spec: DataSpec) -> None:
    """A table without rows makes the library ask Arrow for batches of none."""
    if spec.kind != "parquet":
        return
    from pyarrow import parquet

    if _translated(str(path), lambda: parquet.read_metadata(path)).num_rows == 0:
        raise InvalidInputError(f"{path}: no rows in it")


def _open_hub(spec: DataSpec) -> tuple[Any, str | None]:
    """The data set and its commit. Offline: a snapshot in the hub's cache, else what the library prepared."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    is_offline = huggingface_hub.is_offline_mode()
    try:
        path, revision = _snapshot(spec.location) if is_offline else (None, _current_commit(spec.location))
        options = {} if path else {"revision": revision}
        # What the library prepared earlier is not a stream; everything else is read as it is needed.
        streaming = bool(path) or not is_offline
        dataset = datasets.load_dataset(
            path or spec.location, name=spec.config, split=spec.split, streaming=streaming, **options
        )
    except ValueError as error:  # unknown config or split
        raise InvalidInputError(f"{spec.text}: {_cause(error)}") from error
    except (OSError, HfHubHTTPError) as error:
        remedy = "; offline (HF_HUB_OFFLINE), and not in the cache" if is_offline else ""
        raise DownloadError(f"{spec.text}: {_cause(error)}{remedy}") from error
    return dataset, revision


def _snapshot(repo_id: str) -> tuple[str | None, str | None]:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = huggingface_hub.snapshot_download(repo_id, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError:
        return None, None
    return path, Path(path).name


def _current_commit(repo_id: str) -> str | None:
    import huggingface_hub

    return huggingface_hub.HfApi().dataset_info(repo_id).sha


def _translated(where: str, call: Callable[[], Any]) -> Any:
    """call(), with what the library raises for broken files as InvalidInputError."""
    try:
        return call()
    except BROKEN as error:
        raise InvalidInputError(f"{where}: cannot be read: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The innermost cause in one line: the library wraps what went wrong in what it was doing."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip() or type(cause).__name__
    return text.splitlines()[0]
