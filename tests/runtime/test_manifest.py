"""bundle.json as hostile input: one attack per rule, and every single byte flip."""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kttools_runtime import strict_json
from kttools_runtime.config import ModelConfig
from kttools_runtime.config_checks import has_default
from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.manifest import (
    FEATURES,
    FORMAT,
    KEYS,
    LINEAR_FORMATS,
    MAX_MANIFEST_BYTES,
    OPTIONAL_KEYS,
    VERSION,
    load_manifest,
    parse_manifest,
    read_manifest,
    self_sha256,
)
from tests.runtime.test_config import VALUES

HASHES = {"xxh3_128": "0" * 32, "sha256": "a" * 64}
DOCUMENT: dict[str, Any] = {
    "format": "kttools-bundle",
    "version": 1,
    "tool": {"name": "kttools", "version": "0.1.0"},
    "model": VALUES,
    "source": {"config": {"n": 1e-6}, "files": [{"path": "config.json", "bytes": 5, "sha256": "b" * 64}]},
    "recipe": {"cpu_format": "int8"},
    "experts": {
        "1": {"file": "experts/layer-00001.ktpack", "format": "int8"},
        "3": {"file": "experts/layer-00003.ktpack", "format": "int4_g32"},
    },
    "linears": {"lm_head": "int4"},
    "files": [
        {"path": "experts/layer-00001.ktpack", "bytes": 3, **HASHES},
        {"path": "experts/layer-00003.ktpack", "bytes": 0, **HASHES},
    ],
}


def document(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(DOCUMENT)) | changes


def signed(content: dict[str, Any]) -> bytes:
    """Canonical bytes with the right checksum: only the content is hostile."""
    return strict_json.canonical(content | {"manifest_sha256": self_sha256(content)})


def write_bundle(root: Path, content: dict[str, Any]) -> Path:
    (root / "experts").mkdir(parents=True)
    (root / "experts/layer-00001.ktpack").write_bytes(b"abc")
    (root / "experts/layer-00003.ktpack").write_bytes(b"")
    (root / "bundle.json").write_bytes(signed(content))
    return root


def test_reads_what_is_there(tmp_path: Path) -> None:
    manifest = load_manifest(write_bundle(tmp_path / "b", document()))
    assert manifest.model == ModelConfig.from_dict(VALUES)
    assert manifest.experts[3].format == "int4_g32"
    assert manifest.expert_path(1).read_bytes() == b"abc"
    assert manifest.files["experts/layer-00001.ktpack"].bytes == 3
    assert manifest.linears == {"lm_head": "int4"}
    with pytest.raises(InvalidInputError, match="does not list 'x'"):
        manifest.path("x")


def change(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        if to is ...:
            del content[keys[-1]]
        else:
            content[keys[-1]] = to

    return apply


def paths(*values: Any) -> list[dict[str, Any]]:
    listed = [{"path": value, "bytes": 0, **HASHES} for value in values]
    return json.loads(json.dumps(DOCUMENT["files"])) + listed


def mixed(*formats: Any) -> dict[str, Any]:
    return {"file": "experts/layer-00003.ktpack", "format": "mixed", "formats": list(formats)}


EXTRA = {
    "requires": [],
    "fingerprint": "c" * 64,
    "license": {"id": "mit", "name": None, "link": None, "files": ["experts/layer-00003.ktpack"]},
    "model_card": None,
    "expert_tables": {"experts/layer-00001.ktpack": "a table"},
}
NUM_EXPERTS = VALUES["n_routed_experts"]
PLAIN = "is not a plain relative path"
ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "other format": (change("format", to="zip"), "not a kttools-bundle manifest"),
    "missing key": (change("recipe", to=...), "missing keys: recipe"),
    "model broken": (change("model", "n_group", to=5), "model config: n_group must be a divisor"),
    "model a list": (change("model", to=[]), "model config: .* must be an object"),
    "tool without version": (change("tool", to={"name": "x"}), "tool must give name and version"),
    "tool a number": (change("tool", to=1), "tool must be an object"),
    "source without files": (change("source", to={"config": {}}), "source must give config and files"),
    "source files an object": (change("source", "files", to={}), "source.files must be a list"),
    "source file of odd keys": (
        change("source", "files", to=[{}]),
        "source.files: expected path, bytes and sha256",
    ),
    "source hash": (
        change("source", "files", 0, "sha256", to="x"),
        "a hash must be 64 lower-case hex digits",
    ),
    "recipe a list": (change("recipe", to=[]), "recipe must be an object"),
    "layer missing": (change("experts", "3", to=...), "experts must list the MoE layers"),
    "layer too many": (change("experts", "2", to={}), "experts must list the MoE layers"),
    "layer with a zero": (change("experts", "03", to={}), "experts must list the MoE layers"),
    "expert without format": (
        change("experts", "3", "format", to=...),
        "experts.3 must give file and format",
    ),
    "expert of no file": (change("experts", "3", "file", to="x"), "experts.3: 'x' is not in files"),
    "expert file a list": (change("experts", "3", "file", to=[]), r"experts.3: \[\] is not in files"),
    "expert format": (
        change("experts", "3", "format", to="In T"),
        "experts.3.format: expected a format name",
    ),
    "mixed without formats": (
        change("experts", "3", "format", to="mixed"),
        "experts.3.formats must give a format for each of",
    ),
    "formats of too few experts": (
        change("experts", "3", to=mixed("int8", "bf16")),
        "experts.3.formats must give a format for each of",
    ),
    "formats all the same": (
        change("experts", "3", to=mixed(*["int8"] * NUM_EXPERTS)),
        "expected different formats of a mixed pack",
    ),
    "formats mixed again": (
        change("experts", "3", to=mixed("mixed", *["int8"] * (NUM_EXPERTS - 1))),
        "expected different formats of a mixed pack",
    ),
    "formats of a number": (
        change("experts", "3", to=mixed(4, *["int8"] * (NUM_EXPERTS - 1))),
        "experts.3.formats: expected a format name",
    ),
    "formats of a uniform pack": (
        change("experts", "3", "formats", to=["int4_g32"] * NUM_EXPERTS),
        "experts.3: formats are for a mixed pack only",
    ),
    "linear format": (change("linears", "lm_head", to="int3"), "int4, q4_k, q5_k, q6_k, q8_0, got 'int3'"),
    "linear format a list": (change("linears", "lm_head", to=[]), "expected bf16, int8, int4"),
    "files an object": (change("files", to={}), "files must be a list of path"),
    "file of odd keys": (change("files", 0, "size", to=1), "files must be a list of path"),
    "up": (change("files", to=paths("../x")), PLAIN),
    "up inside": (change("files", to=paths("a/../../x")), PLAIN),
    "dot": (change("files", to=paths("./x")), PLAIN),
    "absolute": (change("files", to=paths("/etc/passwd")), PLAIN),
    "double slash": (change("files", to=paths("a//x")), PLAIN),
    "trailing slash": (change("files", to=paths("a/")), PLAIN),
    "backslash": (change("files", to=paths("a\\x")), PLAIN),
    "drive": (change("files", to=paths("C:x")), PLAIN),
    "hidden": (change("files", to=paths(".ssh/x")), PLAIN),
    "zero byte": (change("files", to=paths("a\0")), PLAIN),
    "newline": (change("files", to=paths("a\n")), PLAIN),
    "empty path": (change("files", to=paths("")), PLAIN),
    "long path": (change("files", to=paths("a" * 600)), PLAIN),
    "path a number": (change("files", to=paths(1)), PLAIN),
    "itself": (change("files", to=paths("bundle.json")), PLAIN),
    "twice": (change("files", to=paths("x", "x")), "'x' is listed twice"),
    "itself in capitals": (change("files", to=paths("Bundle.JSON")), PLAIN),
    "the signature": (change("files", to=paths("bundle.json.sig")), PLAIN),
    "long name": (change("files", to=paths("a/" + "b" * 256)), PLAIN),
    "other case": (change("files", to=paths("a/x", "a/X")), "'a/X' and 'a/x' differ only in case"),
    "folder in other case": (change("files", to=paths("a/x", "A/y")), "folders 'A' and 'a' differ only"),
    "a file and a folder": (change("files", to=paths("a/b", "a")), "'a' is listed as a file and as a folder"),
    "requires no list": (change("requires", to={}), "requires must be a list"),
    "requires numbers": (change("requires", to=[1]), "requires must be a list"),
    "requires twice": (change("requires", to=["partial"] * 2), "requires must be sorted, each feature once"),
    "short fingerprint": (change("fingerprint", to="ab"), "fingerprint: a hash must be 64"),
    "license a text": (change("license", to="mit"), "license must give id, name, link and files"),
    "license with an escape": (
        change("license", to=EXTRA["license"] | {"name": "\x1b[2J"}),
        "license.name must be a line of text",
    ),
    "license of no file": (
        change("license", to=EXTRA["license"] | {"files": ["x"]}),
        "license.files: 'x' is not in files",
    ),
    "model card a list": (change("model_card", to=[]), r"model_card: \[\] is not in files"),
    "table of no file": (change("expert_tables", to={"x": "y"}), "expert_tables: 'x' is not in files"),
    "table without a name": (change("expert_tables", to={"x": ""}), "must give a name for each path"),
    "one pack of two layers": (
        change("experts", "3", "file", to="experts/layer-00001.ktpack"),
        "experts.3: 'experts/layer-00001.ktpack' is the pack of layer 1, too",
    ),
    "escape in the tool's name": (change("tool", "name", to="\x1b]0;x"), "tool must give name and version"),
    "negative size": (change("files", 0, "bytes", to=-1), "must be a non-negative integer"),
    "boolean size": (change("files", 0, "bytes", to=True), "must be a non-negative integer"),
    "huge size": (change("files", 0, "bytes", to=2**63), "must be a non-negative integer"),
    "short hash": (change("files", 0, "sha256", to="a" * 63), "a hash must be 64 lower-case hex digits"),
    "upper-case hash": (
        change("files", 0, "xxh3_128", to="A" * 32),
        "a hash must be 32 lower-case hex digits",
    ),
}


@pytest.mark.parametrize(("attack", "message"), ATTACKS.values(), ids=ATTACKS.keys())
def test_hostile_content(attack: Callable[[dict[str, Any]], None], message: str) -> None:
    content = document()
    attack(content)
    with pytest.raises(CorruptFileError, match=message):
        parse_manifest(signed(content), Path("b"))


@pytest.mark.parametrize("version", [0, 2, "1", True, None])
def test_other_versions_are_not_called_damaged(version: Any) -> None:
    with pytest.raises(InvalidInputError, match="this program reads version 1") as caught:
        parse_manifest(signed(document(version=version)), Path("b"))
    assert not isinstance(caught.value, CorruptFileError)


def test_every_byte_flip_is_noticed() -> None:
    data = signed(document())
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(InvalidInputError):
            parse_manifest(bytes(flipped), Path("b"))


def test_every_cut_is_noticed() -> None:
    data = signed(document())
    for length in range(len(data)):
        with pytest.raises(CorruptFileError):
            parse_manifest(data[:length], Path("b"))


def test_only_the_canonical_bytes() -> None:
    content = document()
    content["manifest_sha256"] = self_sha256(content)
    for data in (
        json.dumps(content).encode(),
        json.dumps(content, indent=1, sort_keys=False).encode() + b"\n",
        strict_json.canonical(content) + b"\n",
        strict_json.canonical(content).replace(b'"bytes": 3', b'"bytes":  3'),
    ):
        with pytest.raises(CorruptFileError, match="not in canonical form"):
            parse_manifest(data, Path("b"))


def test_wrong_checksum() -> None:
    content = document() | {"manifest_sha256": "0" * 64}
    with pytest.raises(CorruptFileError, match="manifest_sha256 does not match"):
        parse_manifest(strict_json.canonical(content), Path("b"))
    content["manifest_sha256"] = 7
    with pytest.raises(CorruptFileError, match="manifest_sha256 does not match"):
        parse_manifest(strict_json.canonical(content), Path("b"))


def test_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InvalidInputError, match=r"not a bundle \(no bundle.json\)"):
            read_manifest(path)


def test_presence_and_size_at_load(tmp_path: Path) -> None:
    root = write_bundle(tmp_path / "b", document())
    pack = root / "experts/layer-00001.ktpack"
    pack.write_bytes(b"abcd")
    with pytest.raises(CorruptFileError, match="expected 3 bytes, got 4; run kttools verify"):
        load_manifest(root)
    pack.unlink()
    with pytest.raises(CorruptFileError, match=r"listed in bundle.json but no such file"):
        load_manifest(root)
    pack.mkdir()
    with pytest.raises(CorruptFileError, match="not a regular file"):
        load_manifest(root)


def test_the_keys_that_came_later() -> None:
    """Absent in bundles from before them; kept where they are; unknown ones carried along."""
    old = parse_manifest(signed(document()), Path("b"))
    assert (old.fingerprint, old.license.id, old.requires, old.other) == (None, None, (), {})
    new = parse_manifest(signed(document(**EXTRA, notes={"of": ["the future"]}, zz=1)), Path("b"))
    assert new.license.to_dict() == EXTRA["license"]
    assert new.expert_tables == EXTRA["expert_tables"]
    assert new.other == {"notes": {"of": ["the future"]}, "zz": 1}


def test_an_unknown_required_feature_is_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match="needs wavelets, unknown to this program") as caught:
        parse_manifest(signed(document(requires=["partial", "wavelets"])), Path("b"))
    assert not isinstance(caught.value, CorruptFileError)


def test_a_partial_bundle_is_read_but_not_loaded(tmp_path: Path) -> None:
    content = document(requires=["partial"])
    with pytest.raises(CorruptFileError, match="some of, not all, the MoE layers"):
        parse_manifest(signed(content), Path("b"))
    del content["experts"]["3"]
    root = write_bundle(tmp_path / "b", content)
    assert list(read_manifest(root).experts) == [1]
    with pytest.raises(InvalidInputError, match="a part of a bundle, without the experts of 1 layers"):
        load_manifest(root)


def test_links_may_not_lead_out(tmp_path: Path) -> None:
    root = write_bundle(tmp_path / "b", document())
    pack, outside = root / "experts/layer-00001.ktpack", tmp_path / "outside"
    outside.write_bytes(b"abc")
    pack.unlink()
    pack.symlink_to(outside)
    with pytest.raises(CorruptFileError, match="a symbolic link leads out of the bundle"):
        load_manifest(root)
    pack.unlink()
    (root / "inside").write_bytes(b"abc")
    pack.symlink_to(root / "inside")
    load_manifest(root)
    os.rename(root / "experts", tmp_path / "experts")
    (root / "experts").symlink_to(tmp_path / "experts")
    with pytest.raises(CorruptFileError, match="a symbolic link leads out of the bundle"):
        load_manifest(root)


def test_a_bundle_reached_through_a_link_is_fine(tmp_path: Path) -> None:
    root = write_bundle(tmp_path / "b", document())
    (tmp_path / "link").symlink_to(root)
    assert load_manifest(tmp_path / "link").expert_path(1).read_bytes() == b"abc"


def test_the_document_lists_the_keys(repo: Path) -> None:
    text = (repo / "runtime/kttools_runtime/BUNDLE.md").read_text()
    tables = text.split("### Keys of `model` with a default")
    listed, defaulted = (set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) for table in tables)
    assert listed == KEYS | OPTIONAL_KEYS
    assert all(f"`{name}`" in text for name in FEATURES)
    assert defaulted == {f.name for f in dataclasses.fields(ModelConfig) if has_default(f)}
    assert f'`"{FORMAT}"`' in text
    assert f"over {MAX_MANIFEST_BYTES // 10**6} MB" in text
    assert f"version {VERSION}\n" in text
    assert all(f"`{name}`" in text for name in LINEAR_FORMATS)
