"""Fuzz targets of a bundle: its manifest, and the header of a pack.

Both carry a checksum of themselves, which almost no mutation survives; so every input is tried as it is, and
again with the checksum put right, as an attacker would.
"""

import contextlib
import struct
import zlib
from pathlib import Path

from kttools.bundle.manifest import build_manifest, manifest_parts
from kttools_runtime import strict_json
from kttools_runtime.errors import InvalidInputError, PackFormatError
from kttools_runtime.manifest import KEYS, is_plain_path, parse_manifest
from kttools_runtime.manifest_reader import ManifestReader
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


class UnsignedReader(ManifestReader):
    """Reads a document whatever its checksum and form, which cost most of the time."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        self.document = self._check_identity(strict_json.parse(data, where))
        self.requires = self._requires()
        missing = KEYS - set(self.document)
        if missing:
            self._corrupt("missing keys")


def run_manifest(file: Path) -> None:
    parse_one_manifest(file.read_bytes())


def parse_one_manifest(data: bytes) -> None:
    """What is accepted gives only plain paths, and the same manifest when it is written again."""
    if zlib.crc32(data) % 8 == 0:
        with contextlib.suppress(InvalidInputError):
            parse_manifest(data, WHERE)
    manifest = UnsignedReader(data, "manifest").manifest(WHERE)
    assert all(is_plain_path(path) for path in manifest.files)
    assert set(manifest.experts) <= set(manifest.model.moe_layers)
    again = parse_manifest(build_manifest(**manifest_parts(manifest)), WHERE)
    assert manifest_parts(again) == manifest_parts(manifest)


def pack_seeds(folder: Path) -> list[bytes]:
    for number, formats in enumerate((("int8", "int4_g64", "bf16"), ("int8",), ("int4_g32", "int4_g128"))):
        write_pack(folder / f"{number}.ktpack", formats, number)
    return [(folder / f"{number}.ktpack").read_bytes() for number in range(3)]


def parse_pack(data: bytes) -> None:
    """The header alone; of one that is accepted, blobs touch from its end to the file's."""
    if len(data) < HEADER.size:
        raise InvalidInputError("too short")
    size = int.from_bytes(data[12:16], "little")
    try:
        header = parse_header(data[:size], "pack") if HEADER.size <= size <= len(data) else None
    except PackFormatError:
        image = bytearray(data[:size])
        image[48:56] = header_checksum(image).to_bytes(8, "little")
        header = parse_header(bytes(image), "pack")
    if header is None:
        parse_header(data, "pack")
        return
    end = header.header_bytes
    for expert in header.experts:
        assert expert.offset == end
        end += expert.bytes
    assert end == header.file_bytes < 1 << 63


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
    "manifest": Target(".json", manifest_seeds, run_manifest, parse_one_manifest),
    "pack": Target(".ktpack", pack_seeds, run_pack, parse_pack),
}
