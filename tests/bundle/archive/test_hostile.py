"""Archives that mean harm, or are damaged: exit 3, one line, nothing under the final name or outside."""

import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from kttools import cli
from kttools.bundle.archive import Archive
from kttools.bundle.archive.names import names_problem
from kttools_runtime import strict_json
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.manifest import self_sha256
from tests.bundle.archive.archive_forge import FRAME, Image, cut, of_bundle, of_files, zstd

Lie = Callable[[Image], None]


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], images: list[bytes], *options: str) -> str:
    """Unpacks what must be refused; returns the one line. The folder holds the archive and nothing else."""
    paths = [tmp_path / f"part{number}.ktz" for number in range(len(images))]
    for path, data in zip(paths, images, strict=True):
        path.write_bytes(data)
    code = cli.main(["bundle", "unpack", "--quiet", *map(str, paths), "-o", str(tmp_path / "out"), *options])
    error = capsys.readouterr().err
    assert code == 3, error
    assert len(error.splitlines()) == 1
    assert error.startswith("kttools: error: ")
    left = {path.name for path in tmp_path.iterdir()} - {path.name for path in paths}
    assert left <= {".out.unpack"}, left
    staged = [path for path in tmp_path.rglob("*") if ".out.unpack" in path.parts and not path.is_dir()]
    assert not any(path.is_symlink() or not path.is_file() for path in staged)
    for path in paths:
        path.unlink()
    return error


def lying(**fields: Any) -> Lie:
    return lambda image: image.lies.update(fields)


def with_member(number: int, name: bytes | None = None, size: int | None = None) -> Lie:
    """Another name or size in the member table."""

    def change(image: Image) -> None:
        old_name, old_size = image.members[number]
        image.members[number] = (old_name if name is None else name, old_size if size is None else size)

    return change


def with_sizes(change: Callable[[list[list[int]]], object]) -> Lie:
    """The seek table's sizes, changed."""

    def lie(image: Image) -> None:
        sizes = [[len(p), len(c)] for p, c in zip(image.packed, image.contents, strict=True)]
        sizes.append([len(image.index()), 0])
        change(sizes)
        image.lies["sizes"] = sizes

    return lie


def with_attribute(**fields: int) -> Lie:
    def change(image: Image) -> None:
        for name, value in fields.items():
            setattr(image, name, value)

    return change


def set_size(entry: int, column: int, value: int) -> Callable[[list[list[int]]], object]:
    return lambda sizes: sizes[entry].__setitem__(column, value)


def shift_sizes(sizes: list[list[int]]) -> None:
    """The sum is right, the borders are not."""
    sizes[1][0] += 20
    sizes[2][0] -= 20


NAMES: dict[str, bytes] = {
    "parent": b"../escaped.json",
    "parent inside": b"tokenizer/../../escaped.json",
    "absolute": b"/tmp/escaped.json",
    "two slashes": b"//escaped.json",
    "empty part": b"tokenizer//x.json",
    "dot": b"./x.json",
    "dot dot": b"..",
    "ends in a slash": b"tokenizer/",
    "empty": b"",
    "backslash": b"..\\escaped.json",
    "drive": b"C:escaped.json",
    "NUL": b"x.json\0.png",
    "newline": b"x\n.json",
    "escape sequence": b"\x1b[2J",
    "hidden": b".bashrc",
    "home": b"~/x.json",
    "latin-1": b"caf\xe9.json",
    "composed": "caf\u00e9.json".encode(),
    "decomposed": "cafe\u0301.json".encode(),
    "full width": "\uff0e\uff0e/x".encode(),
    "right to left": "x\u202enosj.exe".encode(),
    "CON": b"con",
    "NUL device": b"tokenizer/NUL.json",
    "LPT1": b"lpt1.ktpack",
    "ends in a dot": b"x.json.",
    "part too long": b"a" * 256,
    "name too long": b"a/" * 300 + b"a",
    "another name": b"tokenizer/other.json",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(tmp_path: Path, capsys: pytest.CaptureFixture[str], sound_bundle: Path, name: str) -> None:
    image = of_bundle(sound_bundle)
    with_member(len(image.members) - 1, name=NAMES[name])(image)
    assert re.search("member|folder", refused(tmp_path, capsys, [image.bytes()]))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "another name"])
def test_names_that_the_manifest_has_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sound_bundle: Path, name: str
) -> None:
    """Everything in the archive agrees: table, tar header, manifest and its hash of itself."""
    text = NAMES[name].decode("latin-1")
    document = strict_json.parse((sound_bundle / "bundle.json").read_bytes(), "x")
    document["files"][-1]["path"] = text
    document["manifest_sha256"] = self_sha256(document)
    files = [("bundle.json", strict_json.canonical(document))]
    files += [
        (entry["path"], (sound_bundle / entry["path"]).read_bytes()) for entry in document["files"][:-1]
    ]
    files.append((text.rstrip("/") or "x", (sound_bundle / "tokenizer/tokenizer.json").read_bytes()))
    image = of_files(files)
    image.members[-1] = (NAMES[name], image.members[-1][1])
    refused(tmp_path, capsys, [image.bytes()])


COLLISIONS = {
    "twice": (["a/x", "b", "a/x"], "twice, or differs"),
    "case of a file": (["a/x", "A/X"], "twice, or differs|one where case"),
    "case of a folder": (["a/x", "A/y"], "folders 'a' and 'A' are one"),
    "file and folder": (["a", "a/x"], "both a file and a folder"),
    "file and folder in another case": (["A", "a/x"], "both a file and a folder"),
    "reserved": (["aux.json"], "reserved on some systems"),
}


@pytest.mark.parametrize("case", COLLISIONS)
def test_collisions(case: str) -> None:
    names, message = COLLISIONS[case]
    assert re.search(message, names_problem(names) or "")
    assert names_problem(["a/x", "a/y", "b"]) is None


def test_a_member_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str], sound_bundle: Path) -> None:
    image = of_bundle(sound_bundle)
    image.members[-1] = (image.members[-2][0], image.members[-1][1])
    assert "twice" in refused(tmp_path, capsys, [image.bytes()])


def tar_header(**fields: Any) -> bytes:
    info = tarfile.TarInfo("tokenizer/tokenizer.json")
    info.mode = 0o644
    for name, value in fields.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.PAX_FORMAT)


TAR_HEADERS: dict[str, dict[str, Any]] = {
    "symbolic link": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    "hard link": {"type": tarfile.LNKTYPE, "linkname": "bundle.json"},
    "character device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
    "block device": {"type": tarfile.BLKTYPE, "devmajor": 8},
    "pipe": {"type": tarfile.FIFOTYPE},
    "directory": {"type": tarfile.DIRTYPE},
    "sparse file": {"type": tarfile.GNUTYPE_SPARSE},
    "another path": {"name": "../escaped"},
    "set-user-id": {"mode": 0o4755},
    "an owner": {"uid": 1000, "uname": "root"},
    "another size": {"size": 1},
    "long path in a record": {"name": "../" * 60 + "x"},
}


@pytest.mark.parametrize("name", TAR_HEADERS)
def test_tar_headers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sound_bundle: Path, name: str
) -> None:
    """What another tar program would obey: the header of the last file is not the only one it may be."""
    image = of_bundle(sound_bundle)
    size = image.members[-1][1]
    fields = {"size": size} | TAR_HEADERS[name]
    padding = image.contents[-3][:-512]
    image.repack(len(image.contents) - 3, padding + tar_header(size=size))
    paths = [tmp_path / "sound.ktz"]
    paths[0].write_bytes(image.bytes())
    Archive(paths).close()
    header = tar_header(**fields)
    image.repack(len(image.contents) - 3, padding + header[: 512 if len(header) > 512 else None])
    paths[0].unlink()
    assert "not the tar header" in refused(tmp_path, capsys, [image.bytes()])


def test_padding_that_hides_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sound_bundle: Path
) -> None:
    image = of_bundle(sound_bundle)
    number = next(i for i, c in enumerate(image.contents) if len(c) % 512 and c.endswith(bytes(512)[:9]))
    image.repack(number, b"x" + image.contents[number][1:])
    assert re.search("tar header|expected xxh3", refused(tmp_path, capsys, [image.bytes()]))


def huge_declared(content: bytes) -> bytes:
    """A raw frame of nothing that declares 2^60 bytes."""
    return bytes.fromhex("28b52ffd e4") + (1 << 60).to_bytes(8, "little") + b"\x01\0\0" + bytes(4)


def huge_window(content: bytes) -> bytes:
    """Not a single segment: a window descriptor of 2 GiB, 4-byte content size."""
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content
    checksum = (xxhash.xxh64_intdigest(content) & 0xFFFFFFFF).to_bytes(4, "little")
    return b"\x28\xb5\x2f\xfd\x84\xa8" + len(content).to_bytes(4, "little") + block + checksum


def with_dictionary(content: bytes) -> bytes:
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content
    checksum = (xxhash.xxh64_intdigest(content) & 0xFFFFFFFF).to_bytes(4, "little")
    return b"\x28\xb5\x2f\xfd\xa5\x07" + len(content).to_bytes(4, "little") + block + checksum


def wrong_checksum(content: bytes) -> bytes:
    packed = zstd(content)
    return packed[:-1] + bytes([packed[-1] ^ 1])


FRAMES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "declares a bomb": (huge_declared, "declares 1152921504606846976 bytes|frames of"),
    "does not declare its size": (lambda c: zstd(c, write_content_size=False), "declares"),
    "is a bomb": (lambda c: zstd(bytes(FRAME)), "declares 1048576 bytes"),
    "window of 2 GiB": (huge_window, "window of 2147483648 bytes"),
    "wants a dictionary": (with_dictionary, "wants dictionary 7"),
    "has no checksum": (lambda c: zstd(c, write_checksum=False), "no checksum"),
    "checksum is wrong": (wrong_checksum, "damaged zstd frame"),
    "two frames": (lambda c: zstd(c[:10]) + zstd(c[10:]), "declares 10 bytes"),
    "a frame and another": (lambda c: zstd(c) + zstd(b"more"), "damaged zstd frame"),
    "a frame in a frame": (lambda c: zstd(zstd(c)), "declares"),
    "a frame and garbage": (lambda c: zstd(c) + b"garbage", "damaged zstd frame"),
    "cut off": (lambda c: zstd(c)[:-5], "damaged zstd frame"),
    "skippable": (lambda c: b"\x50\x2a\x4d\x18" + len(c).to_bytes(4, "little") + c, "not a zstd frame"),
    "gzip": (lambda c: b"\x1f\x8b" + c, "not a zstd frame"),
    "another content": (lambda c: zstd(bytes(len(c))), "does not match the index's checksum"),
    "one bit": (lambda c: zstd(bytes([c[0] ^ 1]) + c[1:]), "does not match the index's checksum"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str], sound_bundle: Path, name: str) -> None:
    make, message = FRAMES[name]
    image = of_bundle(sound_bundle)
    image.packed[-2] = make(image.contents[-2])  # the last file's only frame
    assert re.search(message, refused(tmp_path, capsys, [image.bytes()]))


INDEXES: dict[str, tuple[Lie, str]] = {
    "magic": (lying(magic=b"KTARCHIX"), "not an archive of a bundle"),
    "version": (lying(version=2), "archive version 2, this program reads version 1"),
    "checksum": (lying(checksum=0), "index: checksum"),
    "frame magic": (lying(index_magic=0x184D2A50), "index: wrong magic"),
    "frame length": (lying(index_length=3), "index: wrong magic or length"),
    "part 0": (with_attribute(part=0), "part 0 of 1"),
    "part beyond parts": (with_attribute(part=2), "part 2 of 1"),
    "parts without end": (with_attribute(parts=2**32 - 1), "part 1 of 4294967295"),
    "no members": (lying(num_members=0), "member table"),
    "a member more": (lambda i: i.lies.update(num_members=len(i.members) + 1), "member table is cut off"),
    "a member less": (lambda i: i.lies.update(num_members=len(i.members) - 1), "member table of"),
    "members without end": (lying(num_members=2**32 - 1), "member table is cut off"),
    "table beyond the index": (lying(table_bytes=2**32 - 1), "index of"),
    "table too short": (lambda i: i.lies.update(table_bytes=len(i.table()) - 8), "index of|member table"),
    "name beyond the table": (lying(table=b"\0" * 8 + b"\xff\xff"), "member table|plain"),
    "no frames": (lying(num_frames=0), "index of"),
    "a frame more": (lambda i: i.lies.update(num_frames=len(i.packed) + 1), "index of"),
    "frames that overflow": (lying(num_frames=2**61), "index of"),
    "negative frames": (lying(num_frames=2**64 - 1), "index of"),
    "total of frames": (lying(total_frames=3), "3 frames in all"),
    "total that overflows": (lying(total_frames=2**64 - 1), "frames in all"),
    "first frame": (with_attribute(first_frame=1), "frames 1 to"),
    "first frame that overflows": (with_attribute(first_frame=2**64 - 1), "frames 18446744073709551615"),
    "frame size 0": (lying(frame_bytes=0), "frames of 0 bytes"),
    "frame size": (lying(frame_bytes=FRAME * 2), "frames of 2097152 bytes"),
    "a hash less": (lying(hashes=[0]), "index of"),
    "hash": (lambda i: i.lies.update(hashes=[0] * len(i.packed)), "does not match the index's checksum"),
    "member a byte longer": (with_member(-1, size=33), "content sizes"),
    "member of 2^63 bytes": (with_member(-1, size=2**63), "bytes"),
    "member of 2^64 bytes": (with_member(-1, size=2**64 - 1), "bytes"),
    "manifest of 65 MB": (with_member(0, size=65_000_000), "content sizes"),
    "identity": (lambda i: setattr(i, "identity", bytes(32)), "not the one the index names"),
}
SEEKS: dict[str, tuple[Lie, str]] = {
    "magic": (lying(seek_magic=1), "does not end in a seek table"),
    "descriptor": (lying(descriptor=0x80), "descriptor 0x80"),
    "count 0": (lying(seek_count=0), "seek table of 0 frames"),
    "count 1": (lying(seek_count=1), "seek table of 1 frames"),
    "count without end": (lying(seek_count=2**32 - 1), "seek table of 4294967295 frames"),
    "a frame less": (lambda i: i.lies.update(seek_count=len(i.packed)), "seek table: wrong magic"),
    "frame magic": (lying(seek_frame_magic=0x184D2A50), "seek table: wrong magic"),
    "frame length": (lying(seek_length=0), "seek table: wrong magic or length"),
    "hole": (with_sizes(lambda s: s.pop(1)), "frames of"),
    "overlap": (with_sizes(set_size(1, 0, 1 << 20)), "frames of"),
    "sizes that overflow": (with_sizes(set_size(1, 0, 2**32 - 1)), "frames of"),
    "empty frame": (with_sizes(set_size(1, 0, 0)), "frames of"),
    "borders shifted": (with_sizes(shift_sizes), "not a zstd frame|damaged|frames of"),
    "content size": (with_sizes(set_size(2, 1, 5)), "content sizes are not those"),
    "content bomb": (with_sizes(set_size(2, 1, 2**32 - 1)), "content sizes are not those"),
    "index with content": (with_sizes(set_size(-1, 1, 4)), "index: wrong magic"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes(tmp_path: Path, capsys: pytest.CaptureFixture[str], sound_bundle: Path, name: str) -> None:
    lie, message = INDEXES[name]
    image = of_bundle(sound_bundle)
    lie(image)
    assert re.search(message, refused(tmp_path, capsys, [image.bytes()]))


@pytest.mark.parametrize("name", SEEKS)
def test_seek_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sound_bundle: Path, name: str
) -> None:
    lie, message = SEEKS[name]
    image = of_bundle(sound_bundle)
    lie(image)
    assert re.search(message, refused(tmp_path, capsys, [image.bytes()]))


def test_truncated_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str], sound_bundle: Path) -> None:
    """At every border of a structure, a byte before and a byte after."""
    image = of_bundle(sound_bundle)
    whole, index = image.bytes(), len(image.index())
    borders = [0]
    for packed in image.packed:
        borders.append(borders[-1] + len(packed))
    frames = borders[-1]
    seek = frames + index
    borders += [frames + 8, frames + 8 + 96, frames + 8 + 96 + len(image.table()), seek, seek + 8]
    borders += [len(whole) - 9, len(whole) - 5, len(whole) - 4]
    for border in borders:
        for length in {max(0, border - 1), border, border + 1} - {len(whole)}:
            message = refused(tmp_path, capsys, [whole[:length]])
            assert re.search("cut off|seek table", message), length


@pytest.mark.parametrize("garbage", [b"\0", b"x" * 100, zstd(b"more")], ids=["byte", "bytes", "frame"])
def test_garbage_around(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sound_bundle: Path, garbage: bytes
) -> None:
    whole = of_bundle(sound_bundle).bytes()
    assert "seek table" in refused(tmp_path, capsys, [whole + garbage])
    assert "seek table at" in refused(tmp_path, capsys, [garbage + whole])


def test_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str], sound_bundle: Path) -> None:
    """Missing, foreign, twice, of another cut: each by name."""
    image = of_bundle(sound_bundle)
    one, two, three = (part.bytes() for part in cut(image, 4, 8))
    assert "part 1 of 3 is missing" in refused(tmp_path, capsys, [two, three])
    assert "a part that is missing: 2 of 3" in refused(tmp_path, capsys, [one, three])
    assert "a part that is missing: 3 of 3" in refused(tmp_path, capsys, [two, one])
    assert "is part 2, as is" in refused(tmp_path, capsys, [one, two, two, three])
    other = cut(image, 5, 8)
    assert "begins with frame 5, the part before ends at 4" in refused(
        tmp_path, capsys, [one, other[1].bytes(), three]
    )
    assert "expected of 3" in refused(tmp_path, capsys, [one, cut(image, 4)[1].bytes()])
    foreign = cut(image, 4, 8)[1]
    foreign.identity = bytes(32)
    assert "is of another archive" in refused(tmp_path, capsys, [one, foreign.bytes(), three])
    renamed = cut(image, 4, 8)[1]
    renamed.members[-1] = (b"tokenizer/other.json", renamed.members[-1][1])
    assert "is of another archive" in refused(tmp_path, capsys, [one, renamed.bytes(), three])
    short = cut(image, 4, 8)[2]
    del short.packed[-1], short.contents[-1]
    assert "the last part ends at frame" in refused(tmp_path, capsys, [one, two, short.bytes()])


def test_manifests(tmp_path: Path, capsys: pytest.CaptureFixture[str], sound_bundle: Path) -> None:
    """Absent, not one, or of other files than those that are there."""
    files = [(name.decode(), b"") for name, _ in of_bundle(sound_bundle).members]
    files = [(name, (sound_bundle / name).read_bytes()) for name, _ in files]

    def message(changed: list[tuple[str, bytes]]) -> str:
        return refused(tmp_path, capsys, [of_files(changed).bytes()])

    assert "the first member is" in message(files[1:])
    assert "not valid JSON" in message([("bundle.json", b"{"), *files[1:]])
    assert "not in canonical form" in message([("bundle.json", files[0][1] + b" "), *files[1:]])
    assert "bundle.json of 65000000 bytes" in message([("bundle.json", bytes(65_000_000))])
    assert "members, expected" in message(files[:-1])
    assert "members, expected" in message([*files, ("zz.json", b"more")])
    assert "bytes, expected" in message([*files[:-1], (files[-1][0], files[-1][1] + b" ")])
    assert "expected xxh3_128" in message([*files[:-1], (files[-1][0], files[-1][1][::-1])])
    assert re.search("member .*, expected", message([files[0], *files[2:], files[1]]))
    signature = [files[0], ("bundle.json.sig", bytes(2 << 20)), *files[1:]]
    assert "bundle.json.sig of 2097152 bytes" in message(signature)


def test_files_that_are_no_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe.ktz"
    os.mkfifo(pipe)
    (tmp_path / "folder.ktz").mkdir()
    (tmp_path / "plain.tar").write_bytes(io.BytesIO(bytes(10240)).getvalue())
    for name, message in (
        ("pipe.ktz", "not a regular file"),
        ("folder.ktz", "not a regular file"),
        ("plain.tar", "not an archive"),
        ("missing.ktz", "No such file"),
    ):
        assert cli.main(["bundle", "unpack", str(tmp_path / name), "-o", str(tmp_path / "out")]) == 3
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_forge_makes_archives(tmp_path: Path, sound_bundle: Path) -> None:
    """What is refused above is refused for its lie: without one, the same bytes are read."""
    (tmp_path / "a.ktz").write_bytes(of_bundle(sound_bundle).bytes())
    assert (
        cli.main(["bundle", "unpack", "--quiet", str(tmp_path / "a.ktz"), "-o", str(tmp_path / "out")]) == 0
    )
    for part in cut(of_bundle(sound_bundle), 4, 8):
        (tmp_path / f"b-{part.part:05d}-of-00003.ktz").write_bytes(part.bytes())
    paths = [str(path) for path in tmp_path.glob("b-*")]
    assert cli.main(["bundle", "unpack", "--quiet", *reversed(paths), "-o", str(tmp_path / "again")]) == 0
    with pytest.raises(InvalidInputError):
        Archive([tmp_path / "again" / "bundle.json"])
