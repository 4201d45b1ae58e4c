"""bundle.json: what a bundle is made of, read as hostile input.

The file must be canonical JSON (see strict_json.canonical) that carries the SHA-256 of itself without the key
`manifest_sha256`; so one changed byte anywhere in it is noticed. Every other file is listed with its size and
two hashes; a path is plain relative names, and no symbolic link may lead out of the bundle.
"""

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import strict_json
from .config import ModelConfig
from .errors import CorruptFileError, InvalidInputError

MANIFEST_NAME = "bundle.json"
FORMAT = "kttools-bundle"
VERSION = 1
MAX_MANIFEST_BYTES = 64_000_000
MAX_PATH_BYTES = 512
LINEAR_FORMATS = ("bf16", "int8", "int4")
MIXED = "mixed"

KEYS = frozenset(
    {
        "format",
        "version",
        "tool",
        "model",
        "source",
        "recipe",
        "experts",
        "linears",
        "files",
        "manifest_sha256",
    }
)
_PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_WORD = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle. path: relative, with forward slashes; hashes in lower-case hex."""

    path: str
    bytes: int
    xxh3_128: str
    sha256: str


@dataclass(frozen=True, slots=True)
class ExpertFile:
    """The pack of one MoE layer: its path in the bundle and the expert format.

    format: MIXED where experts differ; then `formats` gives one for each expert, else it is empty.
    """

    file: str
    format: str
    formats: tuple[str, ...] = ()

    @classmethod
    def of(cls, file: str, formats: Sequence[str]) -> "ExpertFile":
        """From the format of each expert."""
        is_mixed = len(set(formats)) > 1
        return cls(file, MIXED, tuple(formats)) if is_mixed else cls(file, formats[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The different formats in it, sorted."""
        return tuple(sorted(set(self.formats))) or (self.format,)

    def to_dict(self) -> dict[str, Any]:
        """As bundle.json has it."""
        uniform = {"file": self.file, "format": self.format}
        return uniform | {"formats": list(self.formats)} if self.formats else uniform


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checked bundle.json; experts by model layer index, linears by tensor base name, files by path."""

    root: Path
    tool: dict[str, str]
    model: ModelConfig
    source: dict[str, Any]
    recipe: dict[str, Any]
    experts: dict[int, ExpertFile]
    linears: dict[str, str]
    files: dict[str, FileEntry]
    manifest_sha256: str

    def path(self, relative: str) -> Path:
        """Where a listed file lies. Raises InvalidInputError for a file the manifest does not list."""
        if relative not in self.files:
            raise InvalidInputError(f"{self.root / MANIFEST_NAME}: does not list {relative!r}")
        return self.root / relative

    def expert_path(self, layer: int) -> Path:
        return self.path(self.experts[layer].file)


def load_manifest(bundle_dir: str | Path) -> Manifest:
    """Reads bundle.json and checks that every listed file is there with its size. Raises CorruptFileError."""
    manifest = read_manifest(bundle_dir)
    for entry in manifest.files.values():
        problem = presence_problem(manifest.root, entry)
        if problem:
            raise CorruptFileError(f"{manifest.root / entry.path}: {problem}; run kttools verify")
    return manifest


def read_manifest(bundle_dir: str | Path) -> Manifest:
    """Reads and checks bundle.json alone. Raises InvalidInputError (no bundle) or CorruptFileError."""
    root = Path(bundle_dir)
    file = root / MANIFEST_NAME
    if not root.is_dir() or not file.exists():
        raise InvalidInputError(f"{root}: not a bundle (no {MANIFEST_NAME})")
    return parse_manifest(strict_json.read_bounded(file, MAX_MANIFEST_BYTES), root)


def parse_manifest(data: bytes, root: Path) -> Manifest:
    """Checks the bytes of a manifest. Raises CorruptFileError naming the key."""
    where = str(root / MANIFEST_NAME)
    document = strict_json.parse(data, where)
    _check_identity(document, where)
    if strict_json.canonical(document) != data:
        _corrupt(where, "not in canonical form; it was edited or damaged")
    if document["manifest_sha256"] != self_sha256(document):
        _corrupt(where, "manifest_sha256 does not match the content; it was edited or damaged")
    return _Reader(document, where).manifest(root)


def self_sha256(document: dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical bytes without manifest_sha256."""
    unsigned = {key: value for key, value in document.items() if key != "manifest_sha256"}
    return hashlib.sha256(strict_json.canonical(unsigned)).hexdigest()


def is_plain_path(text: Any) -> bool:
    """Relative, forward slashes, plain ASCII names that do not start with a dot."""
    if not isinstance(text, str) or not 0 < len(text) <= MAX_PATH_BYTES:
        return False
    return all(_PATH_PART.fullmatch(part) for part in text.split("/"))


def presence_problem(root: Path, entry: FileEntry) -> str | None:
    """Why a listed file cannot be what the manifest says, without reading it; None when nothing is wrong."""
    path = root / entry.path
    try:
        status = os.stat(path)
        is_inside = path.resolve().is_relative_to(root.resolve())
    except OSError as error:
        return f"listed in {MANIFEST_NAME} but {(error.strerror or 'unreadable').lower()}"
    if not is_inside:
        return "a symbolic link leads out of the bundle"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_size != entry.bytes:
        return f"expected {entry.bytes} bytes, got {status.st_size}"
    return None


def _check_identity(document: Any, where: str) -> None:
    """Format and version first, so that a newer bundle is not called damaged."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        _corrupt(where, f"not a {FORMAT} manifest")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise InvalidInputError(
            f"{where}: bundle version {version!r:.40}, this program reads version {VERSION}"
        )
    if set(document) != KEYS:
        wrong = sorted(set(document) ^ KEYS)
        _corrupt(where, f"unknown or missing keys: {', '.join(wrong):.200}")


class _Reader:
    """The manifest's parts, each checked for type before it is used."""

    def __init__(self, document: dict[str, Any], where: str) -> None:
        self.document = document
        self.where = where

    def manifest(self, root: Path) -> Manifest:
        try:
            model = ModelConfig.from_dict(self.document["model"])
        except InvalidInputError as error:
            raise CorruptFileError(f"{self.where}: {error}") from None
        files = self._files()
        return Manifest(
            root=root,
            tool=self._tool(),
            model=model,
            source=self._source(),
            recipe=self._object("recipe"),
            experts=self._experts(model, files),
            linears=self._linears(),
            files=files,
            manifest_sha256=self.document["manifest_sha256"],
        )

    def _object(self, key: str) -> dict[str, Any]:
        value = self.document[key]
        if not isinstance(value, dict):
            _corrupt(self.where, f"{key} must be an object")
        return value

    def _tool(self) -> dict[str, str]:
        tool = self._object("tool")
        if set(tool) != {"name", "version"} or not all(isinstance(value, str) for value in tool.values()):
            _corrupt(self.where, "tool must give name and version")
        return tool

    def _source(self) -> dict[str, Any]:
        source = self._object("source")
        if set(source) != {"config", "files"} or not isinstance(source["config"], dict):
            _corrupt(self.where, "source must give config and files")
        if not isinstance(source["files"], list):
            _corrupt(self.where, "source.files must be a list")
        for entry in source["files"]:
            is_entry = isinstance(entry, dict) and set(entry) == {"path", "bytes", "sha256"}
            if not is_entry or not isinstance(entry["path"], str) or not _is_size(entry["bytes"]):
                _corrupt(self.where, f"source.files: expected path, bytes and sha256, got {entry!r:.120}")
            self._check_hex(entry["sha256"], 64, "source.files")
        return source

    def _files(self) -> dict[str, FileEntry]:
        entries: dict[str, FileEntry] = {}
        listed = self.document["files"]
        for entry in listed if isinstance(listed, list) else [None]:
            if not isinstance(entry, dict) or set(entry) != {"path", "bytes", "xxh3_128", "sha256"}:
                _corrupt(self.where, "files must be a list of path, bytes, xxh3_128 and sha256")
            path = entry["path"]
            if not is_plain_path(path) or path == MANIFEST_NAME:
                _corrupt(self.where, f"files: {path!r:.200} is not a plain relative path")
            if path in entries:
                _corrupt(self.where, f"files: {path!r} is listed twice")
            if not _is_size(entry["bytes"]):
                _corrupt(self.where, f"files: bytes of {path!r} must be a non-negative integer")
            self._check_hex(entry["xxh3_128"], 32, path)
            self._check_hex(entry["sha256"], 64, path)
            entries[path] = FileEntry(**entry)
        return entries

    def _experts(self, model: ModelConfig, files: dict[str, FileEntry]) -> dict[int, ExpertFile]:
        listed = self._object("experts")
        if sorted(listed) != sorted(map(str, model.moe_layers)):
            _corrupt(
                self.where, f"experts must list the MoE layers {list(model.moe_layers)!s:.120}, each once"
            )
        experts: dict[int, ExpertFile] = {}
        for layer, entry in listed.items():
            if not isinstance(entry, dict) or set(entry) - {"formats"} != {"file", "format"}:
                _corrupt(self.where, f"experts.{layer} must give file and format")
            if not isinstance(entry["file"], str) or entry["file"] not in files:
                _corrupt(self.where, f"experts.{layer}: {entry['file']!r:.200} is not in files")
            self._check_word(entry["format"], f"experts.{layer}.format")
            formats = self._expert_formats(entry, f"experts.{layer}", model.n_routed_experts)
            experts[int(layer)] = ExpertFile(entry["file"], entry["format"], formats)
        return experts

    def _expert_formats(self, entry: dict[str, Any], what: str, num_experts: int) -> tuple[str, ...]:
        """The formats of a mixed pack, one for each expert; () for any other."""
        if entry["format"] != MIXED:
            if "formats" in entry:
                _corrupt(self.where, f"{what}: formats are for a {MIXED} pack only")
            return ()
        formats = entry.get("formats")
        if not isinstance(formats, list) or len(formats) != num_experts:
            _corrupt(self.where, f"{what}.formats must give a format for each of {num_experts} experts")
        for name in formats:
            self._check_word(name, f"{what}.formats")
        if len(set(formats)) < 2 or MIXED in formats:
            _corrupt(self.where, f"{what}.formats: expected different formats of a {MIXED} pack")
        return tuple(formats)

    def _linears(self) -> dict[str, str]:
        linears = self._object("linears")
        for name, format_name in linears.items():
            if format_name not in LINEAR_FORMATS:
                expected = ", ".join(LINEAR_FORMATS)
                _corrupt(self.where, f"linears.{name:.120}: expected {expected}, got {format_name!r:.40}")
        return linears

    def _check_hex(self, value: Any, digits: int, what: str) -> None:
        if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
            _corrupt(self.where, f"{what}: a hash must be {digits} lower-case hex digits, got {value!r:.80}")

    def _check_word(self, value: Any, what: str) -> None:
        if not isinstance(value, str) or not _WORD.fullmatch(value):
            _corrupt(self.where, f"{what}: expected a format name, got {value!r:.80}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _corrupt(where: str, problem: str) -> NoReturn:
    raise CorruptFileError(f"{where}: {problem}")
