"""bundle.json: what a bundle is made of, read as hostile input. docs/bundle.md describes it field by field.

The file must be canonical JSON (see strict_json.canonical) that carries the SHA-256 of itself without the key
`manifest_sha256`; so one changed byte anywhere in it is noticed. Every other file is listed with its size and
two hashes; a path is plain relative names, and no symbolic link may lead out of the bundle.
"""

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import strict_json
from .block_formats import BLOCK_FORMATS
from .config import ModelConfig
from .errors import CorruptFileError, InvalidInputError

MANIFEST_NAME = "bundle.json"
# A detached signature of bundle.json lies beside it and is not listed in it.
SIGNATURE_NAME = "bundle.json.sig"
FORMAT = "kttools-bundle"
VERSION = 1
MAX_MANIFEST_BYTES = 64_000_000
MAX_PATH_BYTES = 512
MAX_NAME_BYTES = 255
LINEAR_FORMATS = ("bf16", "int8", "int4", *BLOCK_FORMATS)
MIXED = "mixed"
# Features a bundle may require of its reader: a reader that does not know one refuses the bundle.
PARTIAL = "partial"  # packs of some MoE layers are left out
SHARE = "share"  # packs hold some of the routed experts
FEATURES = frozenset({PARTIAL, SHARE})

# What every manifest has, and what one may have; any other key is optional, carried along and not read.
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
OPTIONAL_KEYS = frozenset({"requires", "fingerprint", "license", "model_card", "expert_tables", "subset"})
_PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


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
class License:
    """What the checkpoint says of its licence: front matter of its model card, and the texts beside it.

    id: as model hubs name it ("mit", "other"); name, link: given where id is "other"; files: in the bundle.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None
    files: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As bundle.json has it."""
        return {"id": self.id, "name": self.name, "link": self.link, "files": list(self.files)}


@dataclass(frozen=True, slots=True)
class Subset:
    """What a part of a bundle was cut from. of: the whole one's manifest_sha256.

    experts: ids of the routed experts in every pack, ascending, expert i of a pack being the i-th of them;
    None for all.
    """

    of: str
    experts: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As bundle.json has it."""
        return {"of": self.of, "experts": None if self.experts is None else list(self.experts)}


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checked bundle.json; experts by model layer index, linears by tensor base name, files by path.

    fingerprint: of the model, as expert tables carry it (None in a bundle from before it was recorded).
    expert_tables: name of each table by its path. requires: features of FEATURES. subset: of a part cut
    from another bundle. other: keys this program does not know, to be written back as they are.
    """

    root: Path
    tool: dict[str, str]
    model: ModelConfig
    source: dict[str, Any]
    recipe: dict[str, Any]
    experts: dict[int, ExpertFile]
    linears: dict[str, str]
    files: dict[str, FileEntry]
    manifest_sha256: str
    requires: tuple[str, ...] = ()
    fingerprint: str | None = None
    license: License = field(default_factory=License)
    model_card: str | None = None
    expert_tables: dict[str, str] = field(default_factory=dict)
    subset: Subset | None = None
    other: dict[str, Any] = field(default_factory=dict)

    @property
    def is_partial(self) -> bool:
        """Packs of some MoE layers are left out: a part of a bundle, to be moved but not computed with."""
        return PARTIAL in self.requires

    @property
    def pack_experts(self) -> int:
        """Routed experts in each pack: the model's, or a share of them."""
        chosen = self.subset.experts if self.subset else None
        return self.model.n_routed_experts if chosen is None else len(chosen)

    def path(self, relative: str) -> Path:
        """Where a listed file lies. Raises InvalidInputError for a file the manifest does not list."""
        if relative not in self.files:
            raise InvalidInputError(f"{self.root / MANIFEST_NAME}: does not list {relative!r}")
        return self.root / relative

    def expert_file(self, layer: int) -> ExpertFile:
        """The pack of a MoE layer. Raises InvalidInputError for a layer that a partial bundle lacks."""
        if layer not in self.experts:
            raise InvalidInputError(f"{self.root}: a part of a bundle, without the experts of layer {layer}")
        return self.experts[layer]

    def expert_path(self, layer: int) -> Path:
        return self.path(self.expert_file(layer).file)


def load_manifest(bundle_dir: str | Path, allow_partial: bool = False) -> Manifest:
    """Reads bundle.json and checks that every listed file is there with its size.

    allow_partial: layers may be missing, for whoever takes one layer at a time. Raises CorruptFileError, or
    InvalidInputError for a part of a bundle that cannot be computed with.
    """
    manifest = read_manifest(bundle_dir)
    origin = f" of {manifest.subset.of[:16]}" if manifest.subset else ""
    if SHARE in manifest.requires:
        count = f"{manifest.pack_experts} of {manifest.model.n_routed_experts}"
        raise InvalidInputError(
            f"{manifest.root}: a part of a bundle{origin}, with {count} experts a layer; get the whole one"
        )
    if manifest.is_partial and not allow_partial:
        missing = sorted(set(manifest.model.moe_layers) - set(manifest.experts))
        raise InvalidInputError(
            f"{manifest.root}: a part of a bundle{origin}, without the experts of {len(missing)} layers"
            f" (the first is {missing[0]}); get the whole one"
        )
    for entry in manifest.files.values():
        problem = presence_problem(manifest.root, entry)
        if problem:
            raise CorruptFileError(f"{manifest.root / entry.path}: {problem}; run kttools verify")
    return manifest


def read_manifest(bundle_dir: str | Path) -> Manifest:
    """Reads and checks bundle.json alone. Raises InvalidInputError (no bundle) or CorruptFileError."""
    root = Path(bundle_dir)
    file = root / MANIFEST_NAME
    if not root.is_dir() or not os.path.lexists(file):
        raise InvalidInputError(f"{root}: not a bundle (no {MANIFEST_NAME})")
    return parse_manifest(strict_json.read_bounded(file, MAX_MANIFEST_BYTES), root)


def parse_manifest(data: bytes, root: Path) -> Manifest:
    """Checks the bytes of a manifest. Raises CorruptFileError naming the key; see ManifestReader."""
    from .manifest_reader import ManifestReader

    return ManifestReader(data, str(root / MANIFEST_NAME)).manifest(root)


def self_sha256(document: dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical bytes without manifest_sha256."""
    unsigned = {key: value for key, value in document.items() if key != "manifest_sha256"}
    return hashlib.sha256(strict_json.canonical(unsigned)).hexdigest()


def is_plain_path(text: Any) -> bool:
    """Relative, forward slashes, plain ASCII names that do not start with a dot."""
    if not isinstance(text, str) or not 0 < len(text) <= MAX_PATH_BYTES:
        return False
    return all(len(part) <= MAX_NAME_BYTES and _PATH_PART.fullmatch(part) for part in text.split("/"))


def presence_problem(root: Path, entry: FileEntry) -> str | None:
    """Why a listed file cannot be what the manifest says, without reading it; None when nothing is wrong."""
    path = root / entry.path
    try:
        status = os.stat(path)
        is_inside = path.resolve().is_relative_to(root.resolve())
    except OSError as error:
        return f"listed in {MANIFEST_NAME} but {(error.strerror or 'unreadable').lower()}"
    except RuntimeError:  # Path.resolve on a loop of links, before Python 3.13
        return "a loop of symbolic links"
    if not is_inside:
        return "a symbolic link leads out of the bundle"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_size != entry.bytes:
        return f"expected {entry.bytes} bytes, got {status.st_size}"
    return None
