"""The bytes of bundle.json to a Manifest: every part is checked for type and sense before it is used.

Order: is it JSON, is it ours, is it of a version and with features this program knows, is it canonical and
whole, and only then what it says. docs/bundle.md has the rules for readers of the future.
"""

import re
from pathlib import Path
from typing import Any, NoReturn

from . import strict_json
from .config import ModelConfig
from .errors import CorruptFileError, InvalidInputError
from .manifest import (
    FEATURES,
    FORMAT,
    KEYS,
    LINEAR_FORMATS,
    MANIFEST_NAME,
    MIXED,
    OPTIONAL_KEYS,
    PARTIAL,
    SHARE,
    SIGNATURE_NAME,
    VERSION,
    ExpertFile,
    FileEntry,
    License,
    Manifest,
    Subset,
    is_plain_path,
    self_sha256,
)

MAX_TEXT = 1000  # characters of a licence's id, name or link, a table's name, a tool's version
_WORD = re.compile(r"[a-z][a-z0-9_]{0,31}")
_RESERVED = frozenset({MANIFEST_NAME, SIGNATURE_NAME})


class ManifestReader:
    """One manifest. Raises CorruptFileError naming the key, InvalidInputError for a newer program's."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        document = strict_json.parse(data, where)
        self.document: dict[str, Any] = self._check_identity(document)
        self.requires = self._requires()
        missing = sorted(KEYS - set(self.document))
        if missing:
            self._corrupt(f"missing keys: {', '.join(missing)}")
        if self._canonical() != data:
            self._corrupt("not in canonical form; it was edited or damaged")
        if self.document["manifest_sha256"] != self_sha256(self.document):
            self._corrupt("manifest_sha256 does not match the content; it was edited or damaged")

    def manifest(self, root: Path) -> Manifest:
        """Everything, checked."""
        try:
            model = ModelConfig.from_dict(self.document["model"])
        except InvalidInputError as error:
            raise CorruptFileError(f"{self.where}: {error}") from None
        files = self._files()
        subset = self._subset(model.n_routed_experts)
        num_experts = len(subset.experts) if subset and subset.experts else model.n_routed_experts
        return Manifest(
            root=root,
            tool=self._tool(),
            model=model,
            source=self._source(),
            recipe=self._object("recipe"),
            experts=self._experts(model, files, num_experts),
            linears=self._linears(),
            files=files,
            manifest_sha256=self.document["manifest_sha256"],
            requires=self.requires,
            fingerprint=self._fingerprint(),
            license=self._license(files),
            model_card=self._model_card(files),
            expert_tables=self._expert_tables(files),
            subset=subset,
            other={key: self.document[key] for key in self.document.keys() - KEYS - OPTIONAL_KEYS},
        )

    def _check_identity(self, document: Any) -> dict[str, Any]:
        """Format and version first, so that a newer bundle is not called damaged."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            self._corrupt(f"not a {FORMAT} manifest")
        version = document.get("version")
        if type(version) is not int or version != VERSION:
            raise InvalidInputError(
                f"{self.where}: bundle version {version!r:.40}, this program reads version {VERSION}; "
                "use the program that wrote it, or a newer one"
            )
        return document

    def _requires(self) -> tuple[str, ...]:
        """Features, sorted and each once; InvalidInputError for one this program does not know."""
        listed = self.document.get("requires", [])
        if not isinstance(listed, list) or not all(_is_word(name) for name in listed):
            self._corrupt("requires must be a list of feature names")
        unknown = [name for name in listed if name not in FEATURES]
        if unknown:
            raise InvalidInputError(
                f"{self.where}: the bundle needs {', '.join(unknown):.200}, unknown to this program; "
                "use a newer kttools"
            )
        if listed != sorted(set(listed)):
            self._corrupt("requires must be sorted, each feature once")
        return tuple(listed)

    def _canonical(self) -> bytes:
        try:
            return strict_json.canonical(self.document)
        except (RecursionError, ValueError):
            self._corrupt("JSON is nested too deeply")

    def _object(self, key: str) -> dict[str, Any]:
        value = self.document[key]
        if not isinstance(value, dict):
            self._corrupt(f"{key} must be an object")
        return value

    def _tool(self) -> dict[str, str]:
        tool = self._object("tool")
        if set(tool) != {"name", "version"} or not all(_is_text(value) for value in tool.values()):
            self._corrupt("tool must give name and version")
        return tool

    def _source(self) -> dict[str, Any]:
        source = self._object("source")
        if set(source) != {"config", "files"} or not isinstance(source["config"], dict):
            self._corrupt("source must give config and files")
        if not isinstance(source["files"], list):
            self._corrupt("source.files must be a list")
        for entry in source["files"]:
            is_entry = isinstance(entry, dict) and set(entry) == {"path", "bytes", "sha256"}
            if not is_entry or not _is_text(entry["path"]) or not _is_size(entry["bytes"]):
                self._corrupt(f"source.files: expected path, bytes and sha256, got {entry!r:.120}")
            self._check_hex(entry["sha256"], 64, "source.files")
        return source

    def _files(self) -> dict[str, FileEntry]:
        entries: dict[str, FileEntry] = {}
        listed = self.document["files"]
        for entry in listed if isinstance(listed, list) else [None]:
            if not isinstance(entry, dict) or set(entry) != {"path", "bytes", "xxh3_128", "sha256"}:
                self._corrupt("files must be a list of path, bytes, xxh3_128 and sha256")
            path = entry["path"]
            if not is_plain_path(path) or path.lower() in _RESERVED:
                self._corrupt(f"files: {path!r:.200} is not a plain relative path")
            if path in entries:
                self._corrupt(f"files: {path!r} is listed twice")
            if not _is_size(entry["bytes"]):
                self._corrupt(f"files: bytes of {path!r} must be a non-negative integer")
            self._check_hex(entry["xxh3_128"], 32, path)
            self._check_hex(entry["sha256"], 64, path)
            entries[path] = FileEntry(**entry)
        self._check_collisions(entries)
        return entries

    def _check_collisions(self, paths: dict[str, FileEntry]) -> None:
        """No two paths that some file system holds for one, and no file that is a folder of another."""
        seen: dict[str, str] = {}
        for path in paths:
            other = seen.setdefault(path.lower(), path)
            if other != path:
                self._corrupt(f"files: {path!r} and {other!r} differ only in case")
        folders: dict[str, str] = {}
        for path in paths:
            parts = path.split("/")[:-1]
            for depth in range(len(parts)):
                folder = "/".join(parts[: depth + 1])
                if folder.lower() in seen:
                    self._corrupt(f"files: {folder!r} is listed as a file and as a folder")
                if folders.setdefault(folder.lower(), folder) != folder:
                    self._corrupt(
                        f"files: folders {folder!r} and {folders[folder.lower()]!r} differ only in case"
                    )

    def _experts(
        self, model: ModelConfig, files: dict[str, FileEntry], num_experts: int
    ) -> dict[int, ExpertFile]:
        listed = self._object("experts")
        layers = set(map(str, model.moe_layers))
        is_partial = PARTIAL in self.requires
        if not (set(listed) < layers if is_partial else set(listed) == layers):
            some = "some of, not all, " if is_partial else ""
            self._corrupt(
                f"experts must list {some}the MoE layers {list(model.moe_layers)!s:.120}, each once"
            )
        experts: dict[int, ExpertFile] = {}
        for layer, entry in listed.items():
            if not isinstance(entry, dict) or set(entry) - {"formats"} != {"file", "format"}:
                self._corrupt(f"experts.{layer} must give file and format")
            self._check_listed(entry["file"], files, f"experts.{layer}")
            self._check_word(entry["format"], f"experts.{layer}.format")
            formats = self._expert_formats(entry, f"experts.{layer}", num_experts)
            experts[int(layer)] = ExpertFile(entry["file"], entry["format"], formats)
        self._check_distinct(experts)
        return experts

    def _check_distinct(self, experts: dict[int, ExpertFile]) -> None:
        owners: dict[str, int] = {}
        for layer, expert in experts.items():
            other = owners.setdefault(expert.file, layer)
            if other != layer:
                self._corrupt(f"experts.{layer}: {expert.file!r} is the pack of layer {other}, too")

    def _expert_formats(self, entry: dict[str, Any], what: str, num_experts: int) -> tuple[str, ...]:
        """The formats of a mixed pack, one for each expert; () for any other."""
        if entry["format"] != MIXED:
            if "formats" in entry:
                self._corrupt(f"{what}: formats are for a {MIXED} pack only")
            return ()
        formats = entry.get("formats")
        if not isinstance(formats, list) or len(formats) != num_experts:
            self._corrupt(f"{what}.formats must give a format for each of {num_experts} experts")
        for name in formats:
            self._check_word(name, f"{what}.formats")
        if len(set(formats)) < 2 or MIXED in formats:
            self._corrupt(f"{what}.formats: expected different formats of a {MIXED} pack")
        return tuple(formats)

    def _linears(self) -> dict[str, str]:
        linears = self._object("linears")
        for name, format_name in linears.items():
            if not isinstance(format_name, str) or format_name not in LINEAR_FORMATS:
                expected = ", ".join(LINEAR_FORMATS)
                self._corrupt(f"linears.{name!r:.120}: expected {expected}, got {format_name!r:.40}")
        return linears

    def _fingerprint(self) -> str | None:
        value = self.document.get("fingerprint")
        if value is not None:
            self._check_hex(value, 64, "fingerprint")
        return value

    def _license(self, files: dict[str, FileEntry]) -> License:
        value = self.document.get("license")
        if value is None:
            return License()
        if not isinstance(value, dict) or set(value) != {"id", "name", "link", "files"}:
            self._corrupt("license must give id, name, link and files")
        for key in ("id", "name", "link"):
            if value[key] is not None and not _is_text(value[key]):
                self._corrupt(f"license.{key} must be a line of text or null")
        if not isinstance(value["files"], list):
            self._corrupt("license.files must be a list")
        for path in value["files"]:
            self._check_listed(path, files, "license.files")
        return License(value["id"], value["name"], value["link"], tuple(value["files"]))

    def _model_card(self, files: dict[str, FileEntry]) -> str | None:
        value = self.document.get("model_card")
        if value is not None:
            self._check_listed(value, files, "model_card")
        return value

    def _expert_tables(self, files: dict[str, FileEntry]) -> dict[str, str]:
        value = self.document.get("expert_tables", {})
        if not isinstance(value, dict) or not all(_is_text(name) for name in value.values()):
            self._corrupt("expert_tables must give a name for each path")
        for path in value:
            self._check_listed(path, files, "expert_tables")
        return value

    def _subset(self, num_experts: int) -> Subset | None:
        """What this was cut from; its experts are given exactly where they are a share of the model's."""
        value = self.document.get("subset")
        if value is None:
            if SHARE in self.requires:
                self._corrupt(f"subset: a bundle that requires {SHARE} must say which experts it has")
            return None
        if not isinstance(value, dict) or set(value) != {"of", "experts"}:
            self._corrupt("subset must give of and experts")
        self._check_hex(value["of"], 64, "subset.of")
        experts = value["experts"]
        if (experts is not None) != (SHARE in self.requires):
            self._corrupt(f"subset.experts: expected a list where the bundle requires {SHARE}, else null")
        if experts is None:
            return Subset(value["of"])
        are_ids = isinstance(experts, list) and all(_is_size(e) and e < num_experts for e in experts)
        if not are_ids or not 0 < len(experts) < num_experts or sorted(set(experts)) != experts:
            self._corrupt(f"subset.experts: expected some of {num_experts} expert ids, ascending")
        return Subset(value["of"], tuple(experts))

    def _check_listed(self, path: Any, files: dict[str, FileEntry], what: str) -> None:
        if not isinstance(path, str) or path not in files:
            self._corrupt(f"{what}: {path!r:.200} is not in files")

    def _check_hex(self, value: Any, digits: int, what: str) -> None:
        if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
            self._corrupt(f"{what}: a hash must be {digits} lower-case hex digits, got {value!r:.80}")

    def _check_word(self, value: Any, what: str) -> None:
        if not _is_word(value):
            self._corrupt(f"{what}: expected a format name, got {value!r:.80}")

    def _corrupt(self, problem: str) -> NoReturn:
        raise CorruptFileError(f"{self.where}: {problem}")


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _is_text(value: Any) -> bool:
    """One line that can be printed as it is: nothing that moves a terminal's cursor."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
