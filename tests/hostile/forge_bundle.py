"""A small bundle that talks; ways to change it and make its checksums right again, as an attacker would."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from kttools.bundle.hashing import digest_file
from kttools_runtime import strict_json
from kttools_runtime.manifest import self_sha256
from kttools_runtime.pack import EXPERT, HEADER, header_bytes, header_checksum, parse_header
from tests.forge import safetensors_bytes
from tests.runtime.test_pack import OFFSETS
from tests.runtime.test_tokenizer_limits import tokenizer

PACK = "experts/layer-00001.ktpack"
SHARD = "shards/model-00001-of-00002.safetensors"
Spoil = Callable[[Path], None]
EXPERT_OFFSETS = {"format": (0, "I"), "reserved": (4, "I"), "offset": (8, "Q"), "bytes": (16, "Q")}
TEMPLATE = "{{ messages[0].content }}"


def complete(bundle: Path) -> None:
    """Gives the forged bundle a tokenizer and a template, and lists them."""
    vocabulary = {chr(97 + i): i for i in range(26)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": None}
    (bundle / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer(model=model)))
    (bundle / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    document = load(bundle)
    entry = {"path": "tokenizer/chat_template.jinja", "bytes": 0, "xxh3_128": "0" * 32, "sha256": "0" * 64}
    document["files"].append(entry)
    store(bundle, document)
    for file in (bundle / "experts").iterdir():
        file.write_bytes(silent(file.read_bytes()))
    rehash(bundle)


def silent(data: bytes) -> bytes:
    """A pack with zeros for blobs: the forged noise makes scales of any size, and NaN."""
    header = parse_header(data[: int.from_bytes(data[12:16], "little")], "pack")
    entries = [
        replace(expert, xxh3_64=xxhash.xxh3_64_intdigest(bytes(expert.bytes))) for expert in header.experts
    ]
    image = header_bytes(replace(header, experts=tuple(entries)))
    return image + bytes(header.file_bytes - len(image))


def load(bundle: Path) -> dict[str, Any]:
    return dict(json.loads((bundle / "bundle.json").read_text()))


def store(bundle: Path, document: dict[str, Any]) -> None:
    """Canonical, under its right checksum."""
    document.pop("manifest_sha256", None)
    document["manifest_sha256"] = self_sha256(document)
    (bundle / "bundle.json").write_bytes(strict_json.canonical(document))


def rehash(bundle: Path) -> None:
    """The manifest of what lies there now."""
    document = load(bundle)
    for entry in document["files"]:
        digest = digest_file(bundle / entry["path"])
        entry |= {"bytes": digest.bytes, "xxh3_128": digest.xxh3_128, "sha256": digest.sha256}
    document["files"].sort(key=lambda entry: entry["path"])
    store(bundle, document)


def manifest(*keys: Any, to: Any = ...) -> Spoil:
    """Sets (or, without `to`, removes) a key of bundle.json."""

    def spoil(bundle: Path) -> None:
        document = load(bundle)
        parent: Any = document
        for key in keys[:-1]:
            parent = parent[key]
        if to is ...:
            del parent[keys[-1]]
        else:
            parent[keys[-1]] = to
        store(bundle, document)

    return spoil


def listed(*paths: Any) -> Spoil:
    """More files, empty ones."""

    def spoil(bundle: Path) -> None:
        document = load(bundle)
        hashes = {"xxh3_128": xxhash.xxh3_128_hexdigest(b""), "sha256": "a" * 64}
        document["files"] += [{"path": path, "bytes": 0, **hashes} for path in paths]
        store(bundle, document)

    return spoil


def raw(change: Callable[[bytes], bytes]) -> Spoil:
    """The manifest's bytes, changed as they are."""

    def spoil(bundle: Path) -> None:
        file = bundle / "bundle.json"
        file.write_bytes(change(file.read_bytes()))

    return spoil


def content(path: str, data: bytes | str | Callable[[bytes], bytes]) -> Spoil:
    """A listed file of other content, with the manifest's hashes made right."""

    def spoil(bundle: Path) -> None:
        file = bundle / path
        new = data(file.read_bytes()) if callable(data) else data.encode() if isinstance(data, str) else data
        file.write_bytes(new)
        rehash(bundle)

    return spoil


def added(path: str, data: bytes | str) -> Spoil:
    """One more file, listed."""

    def spoil(bundle: Path) -> None:
        (bundle / path).write_bytes(data if isinstance(data, bytes) else data.encode())
        listed(path)(bundle)
        rehash(bundle)

    return spoil


def sparse(path: str, size: int) -> Spoil:
    """A file of absurd length that costs no disk, with the manifest's size made right (not its hash)."""

    def spoil(bundle: Path) -> None:
        with (bundle / path).open("ab") as file:
            file.truncate(size)
        document = load(bundle) if path != "bundle.json" else {"files": []}
        entries = [entry for entry in document["files"] if entry["path"] == path]
        for entry in entries:
            entry["bytes"] = size
        if entries:
            store(bundle, document)

    return spoil


def pack_field(name: str, value: int) -> Spoil:
    """A field of a pack's header, under right checksums all the way up."""

    def change(data: bytes) -> bytes:
        image = bytearray(data)
        code = "Q" if name == "file_bytes" else "I"
        struct.pack_into("<" + code, image, OFFSETS[name], value)
        return seal(image)

    return content(PACK, change)


def pack_entry(expert: int, name: str, change: Callable[[int], int]) -> Spoil:
    """A field of an expert in a pack's table."""

    def edit(data: bytes) -> bytes:
        image = bytearray(data)
        offset, code = EXPERT_OFFSETS[name]
        at = HEADER.size + expert * EXPERT.size + offset
        (value,) = struct.unpack_from("<" + code, image, at)
        struct.pack_into("<" + code, image, at, change(value))
        return seal(image)

    return content(PACK, edit)


def seal(image: bytearray) -> bytes:
    size = min(len(image), int.from_bytes(image[12:16], "little"))
    if size >= HEADER.size:
        image[48:56] = header_checksum(bytes(image[:size])).to_bytes(8, "little")
    return bytes(image)


def shard(change: Callable[[dict[str, Any]], Any], data: Callable[[bytes], bytes] = lambda d: d) -> Spoil:
    """The JSON header of a shard, and its data."""

    def edit(image: bytes) -> bytes:
        length = int.from_bytes(image[:8], "little")
        header = json.loads(image[8 : 8 + length])
        header = change(header) or header
        return safetensors_bytes(header, data(image[8 + length :]))

    return content(SHARD, edit)
