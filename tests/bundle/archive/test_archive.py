"""Pack and unpack: the same bytes back, the same archive always, parts alone, whatever happens between."""

import errno
import filecmp
import io
import json
import os
import random
import re
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from kttools import cli
from kttools.bundle.archive import Archive, Packer, Unpacked, Unpacker, index, staging
from kttools.bundle.archive.frames import decode_frame, encode_frame, store_frame
from kttools.bundle.archive.layout import FRAME_BYTES, Layout, Member, tar_header
from kttools.bundle.archive.staging import filled_runs
from kttools.bundle.lock import hold_directory
from kttools_runtime import strict_json
from kttools_runtime.errors import CorruptFileError, KTError, ResourceError, UsageError
from kttools_runtime.manifest import self_sha256
from tests.bundle.archive.archive_forge import of_bundle, tar_frames
from tests.bundle.archive.conftest import BLOB

LAYER_2 = "experts/layer-00002.ktpack"


def same(left: Path, right: Path) -> bool:
    """The same files with the same bytes."""
    trees = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (left, right)
    ]
    return trees[0] == trees[1]


def unpack(paths: list[Path], target: Path, **options: Any) -> Unpacked:
    with Archive(paths) as archive:
        names = options.pop("names", [member.name for member in archive.members])
        return Unpacker(archive, target, names, **options).run()


@pytest.fixture(scope="module")
def packed(large_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file. Read-only."""
    output = tmp_path_factory.mktemp("packed") / "a.ktz"
    Packer(large_bundle, output).run()
    return output


@pytest.fixture(scope="module")
def split(large_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Several parts. Read-only."""
    output = tmp_path_factory.mktemp("split") / "a.ktz"
    return Packer(large_bundle, output, split_bytes=4_250_000).run().parts


def test_round_trip(packed: Path, large_bundle: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    with Archive([packed]) as archive:
        unpacker = Unpacker(archive, tmp_path / "out", [m.name for m in archive.members])
        done = unpacker.run(seen.append)
    assert same(large_bundle, tmp_path / "out")
    assert sum(seen) + archive_only_bytes(large_bundle) == done.bytes == unpacker.total_bytes
    assert done.kept_frames == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def archive_only_bytes(bundle: Path) -> int:
    """bundle.json is checked when the archive is opened, and not decoded again."""
    return (bundle / "bundle.json").stat().st_size


def test_same_bytes_for_any_number_of_threads(packed: Path, large_bundle: Path, tmp_path: Path) -> None:
    for threads in (1, 5):
        Packer(large_bundle, tmp_path / f"{threads}.ktz", threads=threads).run()
        assert filecmp.cmp(packed, tmp_path / f"{threads}.ktz", shallow=False)
    copy = shutil.copytree(large_bundle, tmp_path / "copy")
    os.utime(copy / BLOB, (1, 1))
    (copy / BLOB).chmod(0o600)
    (copy / "notes.txt").write_text("not listed, not packed")
    Packer(copy, tmp_path / "copy.ktz").run()
    assert filecmp.cmp(packed, tmp_path / "copy.ktz", shallow=False)


def test_the_format_is_what_the_forge_makes(packed: Path, large_bundle: Path) -> None:
    """Everything but the compressed frames is made again from the document alone."""
    data = packed.read_bytes()
    image = of_bundle(large_bundle)
    (count,) = struct.unpack("<I", data[-9:-5])
    table = data[-9 - 8 * count : -9]
    assert count == len(image.contents) + 1
    sizes = [struct.unpack_from("<II", table, 8 * entry) for entry in range(count)]
    at, frames = 0, []
    for size, _ in sizes[:-1]:
        frames.append(data[at : at + size])
        at += size
    image.packed = frames
    assert image.bytes() == data


def test_plain_tools_read_it(split: list[Path], large_bundle: Path, tmp_path: Path) -> None:
    """cat | zstd -d | tar x, in Python: nothing of ours is needed."""
    data = b"".join(path.read_bytes() for path in split)
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True)
    with tarfile.open(fileobj=io.BytesIO(reader.read())) as tar:
        assert all(info.isreg() for info in tar.getmembers())
        tar.extractall(tmp_path / "out", filter="data")
    assert same(large_bundle, tmp_path / "out")


def test_plain_zstd_reads_a_part(split: list[Path]) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("the zstd program is not installed")
    for path in split:
        subprocess.run(["zstd", "-t", "-q", str(path)], check=True)


def test_tar_headers_of_large_files_and_long_names() -> None:
    """Beyond ustar's 8 GiB and 100 characters; and the framing against tarfile's own writer."""
    for name, size in (("a/b", 9 << 30), ("d" * 90 + "/" + "e" * 90, 5), ("f" * 200, 9 << 33)):
        header = tar_header(Member(name, size))
        info = tarfile.TarFile.open(fileobj=io.BytesIO(header), ignore_zeros=True).next()
        assert info is not None
        assert (info.name, info.size, info.isreg()) == (name, size, True)
    files = [("bundle.json", b"x" * 511), ("a/empty", b""), ("a/full", b"y" * 1024), ("b", b"z")]
    layout = Layout([Member(name, len(data)) for name, data in files])
    expected = tar_frames(files)
    assert layout.num_frames == len(expected)
    for frame in layout.frames(0, layout.num_frames):
        assert frame.bytes == len(expected[frame.number])
        if not frame.is_data:
            assert layout.framing(frame.member) == expected[frame.number]


def test_a_signed_bundle_is_held_against_sha256(sound_bundle: Path, tmp_path: Path) -> None:
    """A manifest whose XXH3 is right and whose SHA-256 is not: what a forger of files could make."""
    root = shutil.copytree(sound_bundle, tmp_path / "bundle")
    document = strict_json.read_object(root / "bundle.json")
    document["files"][-1]["sha256"] = "a" * 64
    document["manifest_sha256"] = self_sha256(document)
    (root / "bundle.json").write_bytes(strict_json.canonical(document))
    Packer(root, tmp_path / "a.ktz").run()
    unpack([tmp_path / "a.ktz"], tmp_path / "unasked")
    with pytest.raises(CorruptFileError, match="expected sha256 aaaa"):
        unpack([tmp_path / "a.ktz"], tmp_path / "asked", is_exchange=True)
    (root / "bundle.json.sig").write_bytes(b"signed")
    Packer(root, tmp_path / "b.ktz").run()
    with pytest.raises(CorruptFileError, match="expected sha256 aaaa"):
        unpack([tmp_path / "b.ktz"], tmp_path / "signed")
    assert not (tmp_path / "asked").exists()
    assert not (tmp_path / "signed").exists()


def test_parts(split: list[Path], large_bundle: Path, tmp_path: Path) -> None:
    assert [path.name for path in split] == [
        f"a-{n:05d}-of-{len(split):05d}.ktz" for n in range(1, len(split) + 1)
    ]
    assert len(split) > 2
    assert all(path.stat().st_size <= 4_250_000 for path in split)
    unpack(split[::-1], tmp_path / "out")
    assert same(large_bundle, tmp_path / "out")
    unpack(split[1:2], tmp_path / "siblings")
    assert same(large_bundle, tmp_path / "siblings")


def test_one_file_needs_its_parts_only(split: list[Path], large_bundle: Path, tmp_path: Path) -> None:
    with Archive(split) as archive:
        index = [member.name for member in archive.members].index(LAYER_2)
        frames = set(archive.layout.frames_of(index))
        needed = [p.path for p in archive.parts if p.index.part == 1 or frames & set(p.frames)]
    assert len(needed) < len(split)
    done = unpack(needed, tmp_path / "out", names=[LAYER_2])
    assert (tmp_path / "out" / LAYER_2).read_bytes() == (large_bundle / LAYER_2).read_bytes()
    assert done.files == 1
    assert done.decoded_frames == 2
    with pytest.raises(CorruptFileError, match="is of another archive"):
        Archive([*needed, other_archive(large_bundle, tmp_path)])


def other_archive(bundle: Path, folder: Path) -> Path:
    copy = shutil.copytree(bundle, folder / "other")
    (copy / "bundle.json.sig").unlink()
    return Packer(copy, folder / "other.ktz", split_bytes=4_250_000).run().parts[1]


def test_holes(packed: Path, tmp_path: Path) -> None:
    unpack([packed], tmp_path / "out")
    status = (tmp_path / "out" / BLOB).stat()
    if status.st_blocks * 512 >= status.st_size:
        pytest.skip("this file system makes no holes")
    assert status.st_size - status.st_blocks * 512 > (4 << 20) - 65536


def test_filled_runs() -> None:
    hole = staging.HOLE_BYTES
    assert filled_runs(bytes(3 * hole)) == []
    assert filled_runs(b"x" * hole + bytes(hole) + b"y" * 5) == [(0, hole), (2 * hole, 2 * hole + 5)]
    assert filled_runs(bytes(hole - 1) + b"x" + b"x") == [(0, hole + 1)]
    assert filled_runs(b"") == []


@pytest.mark.parametrize("level", [0, 1, 19])
def test_frames_come_back(level: int) -> None:
    noise = random.Random(1).randbytes(300_000)
    for content in (b"", b"x", noise, bytes(FRAME_BYTES), noise[:1000] * 300, (noise * 14)[:FRAME_BYTES]):
        frame = encode_frame(content, level)
        assert decode_frame(frame, len(content), "x") == content
        assert encode_frame(content, level) == frame
    assert encode_frame(noise, level) == store_frame(noise)
    assert len(store_frame(noise)) < len(noise) + 40


def damaged(packed: Path, folder: Path, name: str) -> Path:
    """A copy with one bit of the member's last frame changed."""
    copy = Path(shutil.copy(packed, folder / "damaged.ktz"))
    with Archive([packed]) as archive:
        index = [member.name for member in archive.members].index(name)
        number = archive.layout.frames_of(index)[-1]
        at = int(archive.parts[0].starts[number]) + archive.packed_bytes(number) // 2
    data = bytearray(copy.read_bytes())
    data[at] ^= 4
    copy.write_bytes(data)
    return copy


def test_resumed(packed: Path, large_bundle: Path, tmp_path: Path) -> None:
    """A run that fails leaves what it has; the next one decodes the rest, and trusts nothing it finds."""
    target, left = tmp_path / "out", tmp_path / ".out.unpack"
    with pytest.raises(CorruptFileError, match="frame"):
        unpack([damaged(packed, tmp_path, "tokenizer/tokenizer.json")], target, threads=1)
    assert not target.exists()
    assert left.is_dir()
    noise = (left / BLOB).read_bytes()
    (left / BLOB).write_bytes(b"?" + noise[1:])
    (left / LAYER_2).write_bytes((left / LAYER_2).read_bytes()[:100])
    (left / "stray.txt").write_text("x")
    (left / "folder/below").mkdir(parents=True)
    (left / "shards/model.safetensors.index.json").unlink()
    (left / "shards/model.safetensors.index.json").symlink_to(tmp_path / "outside")
    done = unpack([packed], target)
    assert same(large_bundle, target)
    assert not (tmp_path / "outside").exists()
    assert not left.exists()
    assert done.kept_frames >= 4
    with Archive([packed]) as archive:
        data_frames = sum(member.data_frames for member in archive.members[1:])
    assert 3 <= data_frames - done.kept_frames <= 5


def test_unpacked_again_is_a_look(packed: Path, tmp_path: Path) -> None:
    unpack([packed], tmp_path / "out")
    assert unpack([packed], tmp_path / "out").decoded_frames == 0
    (tmp_path / "out" / LAYER_2).unlink()
    with pytest.raises(UsageError, match="already there"):
        unpack([packed], tmp_path / "out")


def test_an_empty_target_is_taken_and_no_other(packed: Path, large_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    unpack([packed], tmp_path / "out")
    assert same(large_bundle, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    for name in ("file", "link", "full"):
        with pytest.raises(UsageError, match="already there"):
            unpack([packed], tmp_path / name)
    (tmp_path / ".new.unpack").symlink_to(tmp_path / "full")
    with pytest.raises(UsageError, match="a symbolic link where a folder of our own"):
        unpack([packed], tmp_path / "new")


def test_one_process_at_a_time(packed: Path, large_bundle: Path, tmp_path: Path) -> None:
    with hold_directory(tmp_path / ".out.unpack"), pytest.raises(KTError, match="another process"):
        unpack([packed], tmp_path / "out")
    with hold_directory(tmp_path / ".a.ktz.pack"), pytest.raises(KTError, match="another process"):
        Packer(large_bundle, tmp_path / "a.ktz").run()
    assert not (tmp_path / "out").exists()


def test_a_lock_on_what_was_renamed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder before finished and renamed the folder while this process waited to lock it."""
    real = os.open

    def renaming(path: Any, *rest: Any, **more: Any) -> int:
        descriptor = real(path, *rest, **more)
        os.rename(tmp_path / "work", tmp_path / "done")
        return descriptor

    monkeypatch.setattr(os, "open", renaming)
    with pytest.raises(KTError, match="just finished"), hold_directory(tmp_path / "work"):
        pass


def disk_full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync"])
def test_disk_full(
    packed: Path, large_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Exit 4, nothing under the name; when there is room, a rerun makes it."""
    with monkeypatch.context() as patch:
        patch.setattr(os, call, disk_full)
        with pytest.raises(ResourceError, match="the disk is full"):
            unpack([packed], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    unpack([packed], tmp_path / "out")
    assert same(large_bundle, tmp_path / "out")


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_disk_full_while_packing(
    packed: Path, large_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    output = tmp_path / "a.ktz"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, disk_full)
        with pytest.raises(ResourceError, match="the disk is full"):
            Packer(large_bundle, output).run()
    assert not output.exists()
    Packer(large_bundle, output).run()
    assert filecmp.cmp(packed, output, shallow=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ktz"]


def test_space_is_counted_before(
    packed: Path, large_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(path.stat().st_size for path in large_bundle.rglob("*") if path.is_file())
    need = total - (4 << 20) - archive_only_bytes(large_bundle)  # a frame of zeros is a hole

    def with_free(free: int) -> None:
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with_free(need - 1)
    with pytest.raises(ResourceError, match=f"needs {need} bytes, {need - 1} are free"):
        unpack([packed], tmp_path / "deep/out")
    with pytest.raises(ResourceError, match="needs up to"):
        Packer(large_bundle, tmp_path / "b.ktz").run()
    assert not (tmp_path / "deep").exists()
    assert not (tmp_path / "b.ktz").exists()
    with_free(need)
    unpack([packed], tmp_path / "deep/out")


def test_a_damaged_bundle_is_not_packed(large_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(large_bundle, tmp_path / "bundle")
    data = bytearray((copy / LAYER_2).read_bytes())
    data[9000] ^= 1
    (copy / LAYER_2).write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"layer-00002\.ktpack: content changed"):
        Packer(copy, tmp_path / "a.ktz").run()
    assert not (tmp_path / "a.ktz").exists()
    (copy / LAYER_2).unlink()
    with pytest.raises(CorruptFileError, match="no such file"):
        Packer(copy, tmp_path / "a.ktz")


def test_what_stands_is_replaced_on_demand_only(large_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.ktz"
    parts = Packer(large_bundle, output, split_bytes=4_250_000).run().parts
    for split_bytes in (None, 4_250_000):
        with pytest.raises(UsageError, match="--force"):
            Packer(large_bundle, output, split_bytes=split_bytes).run()
    parts[0].unlink()  # what a run cut off while naming leaves: all but part 1
    assert Packer(large_bundle, output, split_bytes=8_600_000).run().parts != parts
    assert not parts[-1].exists()
    Packer(large_bundle, output, is_forced=True).run()
    assert [path.name for path in tmp_path.iterdir()] == ["a.ktz"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.zip", {}, "ends in .ktz"),
        ("a.ktz", {"level": 20}, "level 20"),
        ("a.ktz", {"split_bytes": 1000}, "too small"),
        ("a-00001-of-00002.ktz", {}, "looks like a part"),
    ],
)
def test_options_that_make_no_sense(
    large_bundle: Path, tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Packer(large_bundle, tmp_path / name, **options).run()
    assert not list(tmp_path.glob("*.ktz"))


def test_not_into_the_bundle(large_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(large_bundle, tmp_path / "bundle")
    with pytest.raises(UsageError, match="lies in the bundle"):
        Packer(copy, copy / "a.ktz").run()


def test_commands(large_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        code = cli.main(["bundle", *map(str, arguments)])
        caught = capsys.readouterr()
        return code, caught.out + caught.err

    code, text = run("pack", large_bundle, "-o", tmp_path / "a.ktz", "--split-size", "5M", "--json")
    assert code == 0
    parts = json.loads(text)["archive"]
    assert len(parts) > 1
    assert run("unpack", *parts, "-o", tmp_path / "out")[0] == 0
    assert same(large_bundle, tmp_path / "out")
    code, text = run("unpack", parts[0], "-o", tmp_path / "words", "--only", "tokenizer/*")
    assert (code, [p.name for p in (tmp_path / "words").iterdir()]) == (0, ["tokenizer"])
    assert run("unpack", parts[0], "-o", tmp_path / "x", "--only", "nothing*") == (
        3,
        f"kttools: error: {parts[0]}: no file matches 'nothing*'\n",
    )
    assert run("unpack", parts[0], "-o", tmp_path / "x", "--only", "*", "--layers", "1")[0] == 2
    assert run("unpack", parts[0], "-o", tmp_path / "x", "--layers", "7")[0] == 2
    assert run("pack", large_bundle, "-o", tmp_path / "b.ktz", "--split-size", "many")[0] == 2
    assert not (tmp_path / "x").exists()


def test_the_document_tells_the_offsets(repo: Path) -> None:
    """The table of docs/archive.md against the struct of the code: types, offsets, constants."""
    text = (repo / "docs/archive.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (u32|u64|8s|32s) \| (\w+) \|", text, re.MULTILINE)
    letters = {"u32": "I", "u64": "Q", "8s": "8s", "32s": "32s"}
    assert "<" + "".join(letters[kind] for _, kind, _ in rows) == "<II" + index.HEADER.format[1:]
    sizes = [struct.calcsize("<" + letters[kind]) for _, kind, _ in rows]
    assert [int(offset) for offset, _, _ in rows] == [sum(sizes[:at]) for at in range(len(sizes))]
    for value in (index.INDEX_FRAME_MAGIC, index.SEEK_FRAME_MAGIC, index.SEEK_MAGIC):
        assert f"0x{value:X}" in text
    for number in (FRAME_BYTES, index.MAX_FRAMES, index.MAX_MEMBERS, index.MAX_PARTS):
        assert str(number) in text
    assert f"`{index.MAGIC.decode()}`" in text
