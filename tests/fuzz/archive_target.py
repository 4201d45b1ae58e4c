"""Fuzz target of an archive: its index and seek table, its frames, and what unpacking makes of them.

The index carries a checksum of itself, which almost no mutation survives; so every input is tried as it is,
and again with the checksum put right, as an attacker would.
"""

import hashlib
import shutil
import struct
from pathlib import Path

import xxhash

from kttools.bundle.archive import Archive, Unpacker
from kttools.bundle.archive.names import name_problem
from kttools_runtime.errors import InvalidInputError
from tests.bundle.archive.archive_forge import Image, cut, of_bundle
from tests.bundle.archive.test_hostile import INDEXES, SEEKS
from tests.fuzz.target import Target
from tests.runtime.test_manifest import document, write_bundle

CHECKSUM_AT, HASHED_FROM = 8 + 88, 8


def archive_seeds(folder: Path) -> list[bytes]:
    """A bundle of a few bytes as one file and as the first of two parts, and lies about it."""
    content = document()
    for entry, data in zip(content["files"], (b"abc", b""), strict=True):  # what write_bundle writes
        entry["sha256"] = hashlib.sha256(data).hexdigest()
        entry["xxh3_128"] = xxhash.xxh3_128_hexdigest(data)
    write_bundle(folder / "bundle", content)
    sound = of_bundle(folder / "bundle")
    first = cut(sound, len(sound.packed) - 1)[0]
    hostile: list[Image] = []
    for lie, _ in [*INDEXES.values(), *SEEKS.values()]:
        image = of_bundle(folder / "bundle")
        try:
            lie(image)
            hostile.append(image)
        except IndexError:  # a lie about a frame that so small an archive does not have
            continue
    return [sound.bytes(), first.bytes()] * 20 + [image.bytes() for image in hostile]


def run_archive(file: Path) -> None:
    """What is accepted has plain names and is unpacked into its folder, whole or not at all."""
    try:
        Archive([file]).close()
    except InvalidInputError:
        mended = with_checksum(file.read_bytes())
        if mended is None:
            raise
        file.write_bytes(mended)
    target = file.parent / "out"
    try:
        with Archive([file]) as archive:
            names = [member.name for member in archive.members]
            assert all(name_problem(name) is None for name in names)
            Unpacker(archive, target, names, threads=1).run()
            sizes = {member.name: member.bytes for member in archive.members}
        found = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if not path.is_dir()}
        assert {name: path.stat().st_size for name, path in found.items()} == sizes
        assert not any(path.is_symlink() for path in found.values())
    finally:
        left = {path.name for path in file.parent.iterdir()} - {file.name, "seeds", "out", ".out.unpack"}
        assert not left, left
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(file.parent / ".out.unpack", ignore_errors=True)


def with_checksum(data: bytes) -> bytes | None:
    """The file with the right checksum in what its end says is the index; None where that is nowhere."""
    if len(data) < 9:
        return None
    (count,) = struct.unpack_from("<I", data, len(data) - 9)
    seek = len(data) - 9 - 8 * count
    if count < 1 or seek < 8:
        return None
    (length,) = struct.unpack_from("<I", data, len(data) - 9 - 8)
    start, end = seek - 8 - length, seek - 8
    if start < 0 or length < CHECKSUM_AT + 8:
        return None
    index = bytearray(data[start:end])
    index[CHECKSUM_AT : CHECKSUM_AT + 8] = bytes(8)
    checksum = xxhash.xxh3_64_intdigest(bytes(index[HASHED_FROM:]))
    index[CHECKSUM_AT : CHECKSUM_AT + 8] = checksum.to_bytes(8, "little")
    return data[:start] + bytes(index) + data[end:]


ARCHIVE_TARGETS = {"archive": Target(".ktz", archive_seeds, run_archive)}
