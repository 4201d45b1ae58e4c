"""Fuzz targets of a bundle: its manifest, and the header of a pack.

Both carry a checksum of themselves, which almost no mutation survives; so every input is tried as it is, and
again with the checksum put right, as an attacker would.
"""

import struct
from pathlib import Path
from typing import Any

from kttools.bundle.manifest import build_manifest, manifest_parts
from kttools_runtime import strict_json
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.manifest import is_plain_path, parse_manifest
from kttools_runtime.pack import HEADER, MAGIC, header_checksum, map_pack, parse_header, read_pack_header
from tests.fuzz.target import Target
from tests.runtime.test_manifest import ATTACKS, EXTRA, document, signed
from tests.runtime.test_pack import write_pack

WHERE = Path("bundle")


def manifest_seeds(_: Path) -> list[bytes]:
    sound = [signed(document()), signed(document(**EXTRA)), signed(document(**EXTRA, later={"a": [1]}))]
    hostile = []
    for attack, _message in ATTACKS.values():
        content = document(**EXTRA)
        attack(content)
        hostile.append(signed(content))
    return sound * 20 + hostile


def run_manifest(file: Path) -> None:
    """What is accepted gives only plain paths, and the same manifest when it is written again."""
    data = file.read_bytes()
    try:
        parse_manifest(data, WHERE)
    except InvalidInputError:
        content: Any = strict_json.parse(data, "manifest")
        if not isinstance(content, dict):
            raise
        content.pop("manifest_sha256", None)
        try:
            data = signed(content)
        except (ValueError, RecursionError):  # lone surrogates, or nested beyond what can be written
            raise InvalidInputError("cannot be written") from None
    manifest = parse_manifest(data, WHERE)
    assert all(is_plain_path(path) for path in manifest.files)
    assert set(manifest.experts) <= set(manifest.model.moe_layers)
    again = parse_manifest(build_manifest(**manifest_parts(manifest)), WHERE)
    assert manifest_parts(again) == manifest_parts(manifest)


def pack_seeds(folder: Path) -> list[bytes]:
    for number, formats in enumerate((("int8", "int4_g64", "bf16"), ("int8",), ("int4_g32", "int4_g128"))):
        write_pack(folder / f"{number}.ktpack", formats, number)
    return [(folder / f"{number}.ktpack").read_bytes() for number in range(3)]


def run_pack(file: Path) -> None:
    """A header that is accepted describes blobs that lie in the file and can be read to their ends."""
    try:
        read_pack_header(file)
    except InvalidInputError:
        data = bytearray(file.read_bytes())
        if len(data) < HEADER.size or data[: len(MAGIC)] != MAGIC:
            raise
        size = struct.unpack_from("<I", data, 12)[0]
        if not HEADER.size <= size <= len(data):
            raise
        data[48:56] = header_checksum(bytes(data[:size])).to_bytes(8, "little")
        parse_header(bytes(data[:size]), "pack")
        file.write_bytes(data)
    header, blobs = map_pack(file)
    length = file.stat().st_size
    for expert, blob in zip(header.experts, blobs, strict=True):
        assert expert.offset + expert.bytes <= length
        assert blob.nbytes == expert.bytes
        assert int(blob[0]) + int(blob[-1]) >= 0


BUNDLE_TARGETS = {
    "manifest": Target(".json", manifest_seeds, run_manifest),
    "pack": Target(".ktpack", pack_seeds, run_pack),
}
