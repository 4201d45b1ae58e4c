"""A model's GGUF files: one file, or splits `name-00001-of-00003.gguf`, found and held against each other."""

import re
from dataclasses import dataclass
from pathlib import Path

from kttools_runtime.errors import CorruptFileError, InvalidInputError

from .header import GgufHeader, GgufTensor, read_gguf_header
from .metadata import Metadata

SUFFIX = ".gguf"
SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_SPLITS = 10_000
NUMBER_KEY, COUNT_KEY, TENSORS_KEY = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True, slots=True)
class GgufFiles:
    """All files of one model. metadata: the first file's; tensors: of all files, in file order."""

    files: tuple[Path, ...]
    metadata: Metadata
    tensors: dict[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """True for a .gguf file, or a directory that holds one and no safetensors."""
    if path.is_dir():
        return any(path.glob(f"*{SUFFIX}")) and not any(path.glob("*.safetensors"))
    return path.suffix == SUFFIX


def locate(path: str | Path) -> tuple[Path, ...]:
    """The files that `path` (a file, any split, or a directory with one model) means, in order.

    Raises InvalidInputError when there is none, more than one model, or a split is missing.
    """
    found = Path(path)
    if found.is_dir():
        found = _only_model(found)
    if not found.is_file():
        raise InvalidInputError(f"{found}: no such file")
    match = SPLIT_NAME.fullmatch(found.name)
    return (found,) if match is None else _splits(found, match)


def open_files(path: str | Path) -> GgufFiles:
    """Reads and checks every header. Raises InvalidInputError or CorruptFileError."""
    files = locate(path)
    headers = [read_gguf_header(file) for file in files]
    _check_splits(headers)
    tensors: dict[str, GgufTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CorruptFileError(f"{header.file}: tensor {name!r} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    if not tensors:
        raise InvalidInputError(f"{files[0]}: holds no tensors; a vocabulary alone is no model")
    _check_total(headers, len(tensors))
    return GgufFiles(files, headers[0].metadata, tensors)


def _only_model(directory: Path) -> Path:
    files = sorted(directory.glob(f"*{SUFFIX}"))
    models = {
        (match["stem"], match["count"]) if (match := SPLIT_NAME.fullmatch(f.name)) else f.name for f in files
    }
    if len(models) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files[:3])
        raise InvalidInputError(f"{directory}: holds {len(models)} GGUF models ({names} ...); name one file")
    raise InvalidInputError(f"{directory}: no GGUF files")


def _splits(file: Path, match: "re.Match[str]") -> tuple[Path, ...]:
    count = int(match["count"])
    if not 1 <= count <= MAX_SPLITS or not 1 <= int(match["number"]) <= count:
        raise InvalidInputError(f"{file}: the name says split {match['number']} of {match['count']}")
    names = [f"{match['stem']}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        raise InvalidInputError(
            f"{file}: {len(missing)} of {count} splits missing, first {missing[0]}; fetch them too"
        )
    return tuple(file.parent / name for name in names)


def _check_splits(headers: list[GgufHeader]) -> None:
    """split.no and split.count must say what the names say; a single file may have neither."""
    for number, header in enumerate(headers):
        if len(headers) == 1 and COUNT_KEY not in header.metadata:
            continue
        for key, expected in ((COUNT_KEY, len(headers)), (NUMBER_KEY, number)):
            got = header.metadata.integer(key, None)
            if got != expected:
                problem = f"{key}: expected {expected} by the files' names, got {got}"
                raise CorruptFileError(f"{header.file}: {problem}")


def _check_total(headers: list[GgufHeader], total: int) -> None:
    metadata = headers[0].metadata
    if len(headers) > 1 and metadata.integer(TENSORS_KEY, total) != total:
        expected = metadata.integer(TENSORS_KEY)
        raise CorruptFileError(f"{headers[0].file}: {TENSORS_KEY} {expected}, the files hold {total} tensors")
