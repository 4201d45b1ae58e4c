"""The writer of bundle.json: what it writes is read back, whole or not at all; hashes are the known ones."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xxhash

from kttools.bundle.atomic import atomic_write_bytes, replacing, translate_oserror
from kttools.bundle.hashing import BLOCK_BYTES, FileDigest, StreamingDigest, digest_file, sha256_file
from kttools.bundle.manifest import build_manifest, collect_files
from kttools.families.deepseek_v3 import read_config
from kttools_runtime import strict_json
from kttools_runtime.errors import CorruptFileError, InvalidInputError, KTError, ResourceError
from kttools_runtime.manifest import ExpertFile, load_manifest, read_manifest
from tests.forge import CONFIG, config


def parts(**changes: Any) -> dict[str, Any]:
    model, _ = read_config(config(first_k_dense_replace=2), {}, "config.json")
    digest = FileDigest(3, "0" * 32, "a" * 64)
    return {
        "config": model,
        "source_config": CONFIG,
        "source_files": [],
        "recipe": {},
        "experts": {2: ExpertFile("experts/layer-00002.ktpack", "int8")},
        "linears": {},
        "files": {"experts/layer-00002.ktpack": digest},
    } | changes


def test_written_manifest_is_read_back(sound_bundle: Path) -> None:
    manifest = load_manifest(sound_bundle)
    assert manifest.tool["name"] == "kttools"
    assert manifest.source["config"] == CONFIG
    assert sorted(manifest.files) == collect_files(sound_bundle)
    for path, entry in manifest.files.items():
        data = (sound_bundle / path).read_bytes()
        assert entry.bytes == len(data)
        assert entry.sha256 == hashlib.sha256(data).hexdigest()
        assert entry.xxh3_128 == xxhash.xxh3_128_hexdigest(data)


def test_same_content_same_bytes() -> None:
    assert build_manifest(**parts()) == build_manifest(**parts())
    assert strict_json.parse(build_manifest(**parts()), "x")["experts"]["2"]["format"] == "int8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": {}}, "experts must list the MoE layers"),
        ({"files": {"../x": FileDigest(0, "0" * 32, "0" * 64)}}, "is not a plain relative path"),
        ({"linears": {"lm_head": "int5"}}, "expected bf16, int8, int4"),
    ],
)
def test_the_writer_refuses_what_the_reader_would(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptFileError, match=message):
        build_manifest(**parts(**changes))


def test_collect_files_skips_what_is_not_content(tmp_path: Path) -> None:
    for name in ("bundle.json", "a/b.bin", ".hidden", ".cache/x", "a/.b.bin.1.part", "left.part", "z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert collect_files(tmp_path) == ["a/b.bin", "z"]


def test_digest_of_several_blocks(tmp_path: Path) -> None:
    data = os.urandom(BLOCK_BYTES + 12345)
    (tmp_path / "x").write_bytes(data)
    seen: list[int] = []
    digest = digest_file(tmp_path / "x", seen.append)
    streaming = StreamingDigest()
    for start in range(0, len(data), 1000):
        streaming.update(memoryview(data)[start : start + 1000])
    assert digest == streaming.finish()
    expected = FileDigest(len(data), xxhash.xxh3_128_hexdigest(data), hashlib.sha256(data).hexdigest())
    assert digest == expected
    assert sha256_file(tmp_path / "x") == expected.sha256
    assert sum(seen) == len(data)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        digest_file(tmp_path / "absent")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x"
    atomic_write_bytes(target, b"old")
    with pytest.raises(ZeroDivisionError), replacing(target) as temporary:
        temporary.write_bytes(b"half") / 0
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]
    atomic_write_bytes(target, b"new")
    assert target.read_bytes() == b"new"


def test_writers_that_take_each_others_file_for_a_dead_ones(tmp_path: Path) -> None:
    """Four processes replace one file as fast as they can, each first tidying away what the dead left."""
    target = tmp_path / "x"
    program = (
        "import pathlib, sys\n"
        "from kttools.bundle.atomic import atomic_write_bytes\n"
        "for _ in range(300):\n"
        "    atomic_write_bytes(pathlib.Path(sys.argv[1]), sys.argv[2].encode() * 1000)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(target), letter], stderr=subprocess.PIPE)
        for letter in "abcd"
    ]
    said = [writer.communicate()[1].decode() for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4, said
    assert target.read_bytes() in {letter * 1000 for letter in (b"a", b"b", b"c", b"d")}
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_put_in_the_place_of_the_locked_one_is_no_result(tmp_path: Path) -> None:
    """Whoever tidies up meanwhile would take it for a dead writer's."""
    (tmp_path / "other").write_bytes(b"x")
    with pytest.raises(AssertionError, match="not written in place"), replacing(tmp_path / "x") as temporary:
        (tmp_path / "other").rename(temporary)
    assert os.listdir(tmp_path) == []


def test_write_errors_become_ours(tmp_path: Path) -> None:
    with pytest.raises(KTError, match=r"nowhere/x: cannot be written: No such file"):
        atomic_write_bytes(tmp_path / "nowhere" / "x", b"")
    full = translate_oserror(OSError(28, "No space left on device"), tmp_path)
    assert isinstance(full, ResourceError)
    assert "the disk is full" in str(full)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError),
        replacing(tmp_path / "x"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert os.listdir(tmp_path) == []


def test_read_manifest_needs_no_other_file(sound_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_bytes((sound_bundle / "bundle.json").read_bytes())
    assert read_manifest(tmp_path).model == read_manifest(sound_bundle).model
    with pytest.raises(CorruptFileError, match="run kttools verify"):
        load_manifest(tmp_path)
