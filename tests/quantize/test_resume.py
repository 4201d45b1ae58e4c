"""Cut-off runs, other people's directories, two writers at once, full and read-only disks."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kttools.bundle.verify import verify_bundle
from kttools.quantize import shard_writer, target, writer
from kttools.quantize.target import STATE_NAME, State, Target, fingerprint
from kttools_runtime import pack_writer
from kttools_runtime.errors import KTError, ResourceError, UsageError
from kttools_runtime.pack import verify_pack
from tests.quantize.conftest import command, contents, plan_for, quantize

REPO = Path(__file__).resolve().parents[2]

# Dies by its own SIGKILL when `name` is called for the count-th time.
DYING = """
import importlib, os, signal, sys
from pathlib import Path
from tests.quantize.conftest import quantize

source, target, place, count = sys.argv[1:]
module, _, path = place.partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
original, calls = getattr(owner, name), iter(range(10**9))

def dying(*args, **kwargs):
    if next(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, dying)
quantize(Path(source), Path(target))
"""


def die(source: Path, bundle: Path, place: str, count: int) -> None:
    line = [sys.executable, "-c", DYING, str(source), str(bundle), place, str(count)]
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def identities(bundle: Path) -> dict[str, tuple[int, int]]:
    """inode and time of every file under its final name."""
    files = [path for path in bundle.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {
        path.relative_to(bundle).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in files
        if STATE_NAME not in path.parts
    }


# (where it dies, at which call, files that a second run must keep)
DEATHS = [
    ("kttools.quantize.target:atomic_write_bytes", 0, set()),
    ("kttools.quantize.target:Target._clear", 0, set()),
    ("kttools.quantize.writer:convert_expert", 0, set()),
    ("kttools.quantize.writer:convert_expert", 8, {"experts/layer-00001.ktpack"}),
    ("kttools_runtime.pack_writer:PackWriter.finish", 1, {"experts/layer-00001.ktpack"}),
    ("kttools.quantize.target:Target.record", 1, {"experts/layer-00001.ktpack"}),
    (
        "kttools.quantize.writer:convert_rows",
        5,
        {f"experts/layer-0000{layer}.ktpack" for layer in (1, 2, 3)},
    ),
    (
        "kttools.quantize.writer:write_manifest",
        0,
        {f"experts/layer-0000{layer}.ktpack" for layer in (1, 2, 3)}
        | {"shards/model-00001-of-00001.safetensors"},
    ),
]


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bundle of a run that nothing interrupted."""
    bundle = tmp_path_factory.mktemp("whole") / "b"
    quantize(checkpoint, bundle)
    return contents(bundle)


@pytest.mark.parametrize(("place", "count", "kept"), DEATHS)
def test_a_killed_run_is_continued(
    checkpoint: Path, tmp_path: Path, whole: dict[str, bytes], place: str, count: int, kept: set[str]
) -> None:
    bundle = tmp_path / "b"
    die(checkpoint, bundle, place, count)
    assert not (bundle / "bundle.json").exists()
    for pack in bundle.glob("experts/*.ktpack"):
        verify_pack(pack)  # whatever has its final name is whole
    before = identities(bundle)
    outcome = quantize(checkpoint, bundle)
    after = identities(bundle)
    assert outcome.kept_files == len(kept)
    assert {path for path in kept if before[path] != after[path]} == set()
    assert contents(bundle) == whole  # and nothing temporary is left


def test_killed_after_the_manifest_the_bundle_stands(checkpoint: Path, tmp_path: Path) -> None:
    die(checkpoint, tmp_path / "b", "kttools.quantize.target:Target.end", 0)
    assert verify_bundle(tmp_path / "b").problems == []
    with pytest.raises(UsageError, match="already holds a bundle"):
        quantize(checkpoint, tmp_path / "b")


def interrupted(checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A run that stops by an error before the manifest, in this process."""

    def stop(*_: object, **__: object) -> None:
        raise KTError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_manifest", stop)
        with pytest.raises(KTError, match="stopped"):
            quantize(checkpoint, bundle, **options)


def test_finished_files_are_not_made_again(
    checkpoint: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(checkpoint, tmp_path / "b", monkeypatch)

    def never(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(writer, "convert_expert", never)
    monkeypatch.setattr(writer, "convert_rows", never)
    assert quantize(checkpoint, tmp_path / "b").kept_files == 4
    assert contents(tmp_path / "b") == whole


def test_a_finished_file_that_changed_is_made_again(
    checkpoint: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "b"
    interrupted(checkpoint, bundle, monkeypatch)
    changed, missing, touched = (bundle / "experts" / f"layer-0000{i}.ktpack" for i in (1, 2, 3))
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    missing.unlink()
    os.utime(touched)
    records = bundle / STATE_NAME
    shard = next(records.glob("shards--model-0*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    outcome = quantize(checkpoint, bundle)
    assert outcome.kept_files == 1  # the touched one: its content is what it was
    assert contents(bundle) == whole


def test_a_damaged_job_is_not_continued_silently(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(checkpoint, tmp_path / "b", monkeypatch)
    (tmp_path / "b" / STATE_NAME / "job.json").write_text("{")
    with pytest.raises(UsageError, match="unfinished bundle of another source"):
        quantize(checkpoint, tmp_path / "b")


@pytest.mark.parametrize("options", [{"cpu": "bf16"}, {"gpu": "int8"}, {"group": 64}])
def test_another_recipe_is_refused_or_forced(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    interrupted(checkpoint, tmp_path / "b", monkeypatch)
    with pytest.raises(UsageError, match="unfinished bundle of another source, recipe or version"):
        quantize(checkpoint, tmp_path / "b", **options)
    assert quantize(checkpoint, tmp_path / "b", force=True, **options).kept_files == 0
    assert verify_bundle(tmp_path / "b").problems == []


def test_another_source_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    interrupted(source, tmp_path / "b", monkeypatch)
    quantizer = writer.Quantizer(plan_for(source), tmp_path / "b")
    assert quantizer.resources().finished_bytes > 0
    os.utime(source / "model.safetensors", ns=(5, 5))
    with pytest.raises(UsageError, match="another source"):
        quantize(source, tmp_path / "b")


def test_workers_are_no_part_of_the_job(
    checkpoint: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(checkpoint, tmp_path / "b", monkeypatch)
    assert quantize(checkpoint, tmp_path / "b", workers=2).kept_files == 4
    assert contents(tmp_path / "b") == whole


def test_a_bundle_is_replaced_only_by_force(
    checkpoint: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    bundle = tmp_path / "b"
    quantize(checkpoint, bundle, cpu="bf16", gpu="bf16")
    before = contents(bundle)
    with pytest.raises(UsageError, match="already holds a bundle; choose another -o, or --force"):
        quantize(checkpoint, bundle)
    assert contents(bundle) == before
    (bundle / "notes.txt").write_text("mine")
    (bundle / "experts" / "layer-00099.ktpack").write_text("an old layer")
    quantizer = writer.Quantizer(plan_for(checkpoint), bundle, is_forced=True)
    assert quantizer.resources().replaced_bytes > sum(len(data) for data in before.values()) * 0.9
    quantizer.run()
    assert contents(bundle) == whole | {"notes.txt": b"mine"}


def test_a_directory_of_other_things_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no bundle"):
        quantize(checkpoint, tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_the_source_is_no_target(checkpoint: Path, tmp_path: Path) -> None:
    before = contents(checkpoint)
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    for path in (checkpoint, link):
        with pytest.raises(UsageError, match="is the source"):
            quantize(checkpoint, path, force=True)
    assert contents(checkpoint) == before


def test_a_file_is_no_target(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(UsageError, match="exists and is not a directory"):
        quantize(checkpoint, tmp_path / "f")
    with pytest.raises(KTError, match=r"Not a directory|not a directory"):
        quantize(checkpoint, tmp_path / "f" / "b")


def test_one_writer_at_a_time(checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_for(checkpoint)
    with Target(tmp_path / "b", fingerprint(plan)).locked():
        with pytest.raises(KTError, match="another process is writing this bundle") as caught:
            quantize(checkpoint, tmp_path / "b")
        assert caught.value.exit_code == 1
    quantize(checkpoint, tmp_path / "b")


def test_two_processes_at_once_make_one_sound_bundle(checkpoint: Path, tmp_path: Path) -> None:
    line = command(checkpoint, tmp_path / "b", "--group-size", "32", "--quiet")
    both = [subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(2)]
    ends = [(process.communicate()[1].decode(), process.returncode) for process in both]
    assert sorted(code for _, code in ends)[0] == 0
    (message, code) = next(end for end in ends if end[1] != 0)
    assert code in (1, 2)
    assert re.search("another process is writing|already holds a bundle|unfinished bundle", message)
    assert verify_bundle(tmp_path / "b").problems == []


@pytest.mark.parametrize("module", [pack_writer, shard_writer])
def test_a_full_disk_leaves_no_broken_file(
    checkpoint: Path,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
) -> None:
    original, calls = os.pwrite, iter(range(10**9))

    def filling(descriptor: int, view: Any, offset: int) -> int:
        if next(calls) >= 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "pwrite", filling)
        with pytest.raises(ResourceError, match="the disk is full") as caught:
            quantize(checkpoint, tmp_path / "b")
    assert caught.value.exit_code == 4
    assert list((tmp_path / "b").rglob("*.part")) == []
    assert quantize(checkpoint, tmp_path / "b").kept_files >= 1
    assert contents(tmp_path / "b") == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 KiB; skips where mounting is not allowed."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("mount is not installed")
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_small_disk_is_refused_first_and_survived_after(checkpoint: Path, small_disk: Path) -> None:
    bundle = small_disk / "b"
    quantizer = writer.Quantizer(plan_for(checkpoint), bundle)
    with pytest.raises(ResourceError, match=r"not enough disk: .* needed, .* available; free"):
        quantizer.resources().check(quantizer.plan, bundle)
    assert not bundle.exists()
    with pytest.raises(ResourceError, match="the disk is full"):
        quantizer.run()
    assert list(bundle.rglob("*.part")) == []
    for pack in bundle.glob("experts/*.ktpack"):
        verify_pack(pack)


def test_a_read_only_target_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(target.Path, "mkdir", refuse)
    with pytest.raises(KTError, match="cannot be written: Read-only file system") as caught:
        quantize(checkpoint, tmp_path / "b")
    assert caught.value.exit_code == 1


def test_states(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "b"
    held = Target(bundle, fingerprint(plan_for(checkpoint)))
    assert held.state() is State.FRESH
    bundle.mkdir()
    assert held.state() is State.FRESH
    (bundle / STATE_NAME).mkdir()  # killed between the directory and the job
    assert held.state() is State.FRESH
    interrupted(checkpoint, bundle, monkeypatch)
    assert held.state() is State.UNFINISHED
    assert Target(bundle, "other").state() is State.OTHER_JOB
    quantize(checkpoint, bundle)
    assert held.state() is State.FINISHED
    assert not (bundle / STATE_NAME).exists()


def test_ctrl_c_stops_and_leaves_no_temporary(
    checkpoint: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "convert_rows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(checkpoint, tmp_path / "b")
    assert list((tmp_path / "b").rglob("*.part")) == []
    assert quantize(checkpoint, tmp_path / "b").kept_files == 3
    assert contents(tmp_path / "b") == whole
