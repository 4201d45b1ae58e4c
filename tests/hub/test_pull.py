"""Pulling: what is fetched, what is kept, what is refused; every byte counted by the server."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from kttools.bundle.hub import fetch
from kttools.bundle.hub.cache import cache_puller, cached_snapshot, note_revision
from kttools.bundle.hub.client import Hub
from kttools.bundle.hub.pull import STATE_NAME, Puller
from kttools.bundle.lock import hold_directory
from kttools.bundle.verify import verify_bundle
from kttools_runtime.errors import (
    CorruptFileError,
    DownloadError,
    InvalidInputError,
    KTError,
    ResourceError,
    UsageError,
)
from kttools_runtime.manifest import MANIFEST_NAME
from tests.hub.conftest import REPO_ID
from tests.hub.stand_in import BLOCK_BYTES, SEND_BUFFER_BYTES, StandIn

SHARD = "shards/model-00001-of-00001.safetensors"
PACK = "experts/layer-00002.ktpack"
# What one interruption may cost: the server counts what its socket took; the receiver's buffer is the rest.
LOST_BYTES = 4 * SEND_BUFFER_BYTES + 2 * BLOCK_BYTES + (256 << 10)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pull(target: Path, force: bool = False) -> int:
    """Pulls; returns how many files were missing."""
    puller = Puller(Hub(REPO_ID), target, force)
    return len(puller.run(puller.plan()).missing)


def served_once(hub: StandIn, files: dict[str, bytes], slack: int = 0) -> None:
    """Nothing was served twice, but for `slack` bytes a file; the manifest is read anew by every plan."""
    for path, data in files.items():
        if path != MANIFEST_NAME:
            assert hub.served[path] <= len(data) + slack, path


def test_a_pull_is_the_bundle_and_a_second_one_fetches_nothing(
    hub: StandIn, nano_bundle: Path, tmp_path: Path
) -> None:
    hub.add(REPO_ID, nano_bundle)
    plan = Puller(Hub(REPO_ID), tmp_path / "b").plan()
    assert not (tmp_path / "b").exists()
    assert plan.fetch_bytes == sum(len(d) for p, d in contents(nano_bundle).items() if p != MANIFEST_NAME)
    assert pull(tmp_path / "b") == len(contents(nano_bundle)) - 1
    assert contents(tmp_path / "b") == contents(nano_bundle)
    served_once(hub, contents(nano_bundle))
    hub.reset_counts()
    assert pull(tmp_path / "b") == 0
    assert set(hub.served) <= {MANIFEST_NAME}
    (tmp_path / "b" / PACK).unlink()
    assert pull(tmp_path / "b") == 1
    assert set(hub.served) <= {MANIFEST_NAME, PACK}
    assert verify_bundle(tmp_path / "b").problems == []


def test_cut_connections_are_resumed_by_ranges(hub: StandIn, nano_bundle: Path, tmp_path: Path) -> None:
    hub.add(REPO_ID, nano_bundle)
    hub.faults.cuts = {SHARD: [1_000_000, 2_000_000, 0, 0], PACK: [0, 500_001]}
    hub.faults.status = {"quantization-report.json": [503, 429, 500]}
    pull(tmp_path / "b")
    assert contents(tmp_path / "b") == contents(nano_bundle)
    served_once(hub, contents(nano_bundle))
    assert (SHARD, "bytes=1000000-") in hub.ranges
    assert (SHARD, "bytes=3000000-") in hub.ranges


def test_killed_and_cut_a_pull_resumes_and_fetches_nothing_twice(
    hub: StandIn, nano_bundle: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """One real process killed by SIGKILL, one cut off by the server until it gives up, one that finishes."""
    hub.add(REPO_ID, nano_bundle)
    files = contents(nano_bundle)
    line = [sys.executable, "-m", "kttools", "bundle", "pull", REPO_ID, "-o", str(tmp_path / "b"), "--quiet"]
    hub.faults.bytes_per_s = 2e6
    first = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL)
    while hub.served[SHARD] < 1_500_000:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert not (tmp_path / "b" / MANIFEST_NAME).exists()
    kept = sum(path.stat().st_size for path in (tmp_path / "b" / STATE_NAME).iterdir())
    assert kept > 1_000_000
    hub.faults.bytes_per_s = 0
    hub.faults.cuts = {SHARD: [2_000_000] + [0] * 50}
    puller = Puller(Hub(REPO_ID), tmp_path / "b")
    with pytest.raises(DownloadError, match=r"bytes are kept") as caught:
        puller.run(puller.plan())
    assert caught.value.exit_code == 7
    hub.faults.cuts = {}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "b") == files
    served_once(hub, files, LOST_BYTES)
    assert hub.served.total() <= sum(map(len, files.values())) + 4 * LOST_BYTES


def test_finished_files_survive_a_failure(hub: StandIn, nano_bundle: Path, tmp_path: Path) -> None:
    hub.add(REPO_ID, nano_bundle)
    smallest = "tokenizer/special_tokens_map.json"  # the last to be fetched
    hub.faults.status = {smallest: [404]}
    with pytest.raises(DownloadError, match="not on the hub"):
        pull(tmp_path / "b")
    hub.reset_counts()
    plan = Puller(Hub(REPO_ID), tmp_path / "b").plan()
    assert plan.resumed_bytes > 0
    pull(tmp_path / "b")
    assert hub.served[smallest] == (nano_bundle / smallest).stat().st_size
    assert hub.served.total() <= plan.fetch_bytes + 2 * len(hub.repos[REPO_ID][MANIFEST_NAME])
    assert contents(tmp_path / "b") == contents(nano_bundle)


def test_a_server_without_ranges_is_still_right(hub: StandIn, nano_bundle: Path, tmp_path: Path) -> None:
    hub.add(REPO_ID, nano_bundle)
    hub.faults.ignores_ranges = True
    hub.faults.cuts = {SHARD: [1_000_000]}
    pull(tmp_path / "b")
    assert contents(tmp_path / "b") == contents(nano_bundle)


def test_a_torn_part_is_fetched_once_more(hub: StandIn, nano_bundle: Path, tmp_path: Path) -> None:
    """After a power cut a file may hold zeros where its bytes should be."""
    hub.add(REPO_ID, nano_bundle)
    file = next(f for f in Puller(Hub(REPO_ID), tmp_path).plan().missing if f.path == PACK)
    (tmp_path / "b" / STATE_NAME).mkdir(parents=True)
    (tmp_path / "b" / STATE_NAME / f"{file.key}.part").write_bytes(bytes(700_000))
    pull(tmp_path / "b")
    assert contents(tmp_path / "b") == contents(nano_bundle)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"flipped": {SHARD: 3_000_000}}, "the content is not what is listed"),
        ({"shorter": {SHARD: 3_000_000}}, r"expected \d+ bytes, the hub has 3000000"),
        ({"longer": {PACK: 100_000}}, "the hub sends more than"),
        ({"flipped": {MANIFEST_NAME: 100}}, "bundle.json"),
    ],
)
def test_a_server_that_lies(
    hub: StandIn, nano_bundle: Path, tmp_path: Path, fault: dict[str, dict[str, int]], message: str
) -> None:
    hub.add(REPO_ID, nano_bundle)
    for name, value in fault.items():
        setattr(hub.faults, name, value)
    with pytest.raises(CorruptFileError, match=message) as caught:
        pull(tmp_path / "b")
    assert caught.value.exit_code == 3
    visible = [path for path in contents(tmp_path / "b") if STATE_NAME not in path] if fault else []
    assert visible == []
    for name in fault:
        setattr(hub.faults, name, {})
    pull(tmp_path / "b")
    assert contents(tmp_path / "b") == contents(nano_bundle)


@pytest.mark.parametrize("change", ["missing", "other size", "other content"])
def test_a_listing_that_contradicts_the_manifest_is_refused_before_a_byte_of_it(
    hub: StandIn, nano_bundle: Path, tmp_path: Path, change: str
) -> None:
    hub.add(REPO_ID, nano_bundle)
    data = hub.repos[REPO_ID].pop(PACK)
    if change != "missing":
        hub.repos[REPO_ID][PACK] = data[1:] + (b"x" if change == "other content" else b"")
    with pytest.raises(CorruptFileError, match=f"{PACK}: .*repository"):
        pull(tmp_path / "b")
    assert set(hub.served) == {MANIFEST_NAME}
    assert not (tmp_path / "b").exists()


def test_the_errors_of_the_hub(hub: StandIn, nano_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="org/nano: not on the hub, or private; check the name"):
        pull(tmp_path / "b")
    hub.add(REPO_ID, nano_bundle)
    with pytest.raises(DownloadError, match="no such revision"):
        Hub(REPO_ID, "v9").files()
    with pytest.raises(DownloadError, match="not a hub id"):
        Hub("a b/c").files()
    hub.required_token = "secret"
    with pytest.raises(DownloadError, match="HF_TOKEN"):
        pull(tmp_path / "b")
    hub.faults.api_status = 500
    with pytest.raises(DownloadError, match="the hub answers HTTP 500"):
        pull(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_nobody_there_and_offline(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        pull(tmp_path / "b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"cannot be reached at http://127\.0\.0\.1:9"):
        pull(tmp_path / "b")


def test_the_token_goes_to_the_hub_and_not_to_its_storage(
    hub: StandIn, nano_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO_ID, nano_bundle)
    hub.required_token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    pull(tmp_path / "b")
    assert contents(tmp_path / "b") == contents(nano_bundle)
    assert hub.storage_tokens == []


def test_another_version_needs_force_and_only_changes_are_fetched(
    hub: StandIn, nano_bundle: Path, nano_bundle_bf16: Path, tmp_path: Path
) -> None:
    hub.add(REPO_ID, nano_bundle_bf16)
    pull(tmp_path / "b")
    before = contents(tmp_path / "b")
    hub.add(REPO_ID, nano_bundle)
    with pytest.raises(UsageError, match="already holds another bundle"):
        pull(tmp_path / "b")
    assert contents(tmp_path / "b") == before
    hub.faults.cuts = {SHARD: [1_000_000] + [0] * 50}
    with pytest.raises(DownloadError):
        pull(tmp_path / "b", force=True)
    assert {p: d for p, d in contents(tmp_path / "b").items() if STATE_NAME not in p} == before
    hub.faults.cuts = {}
    pull(tmp_path / "b", force=True)
    assert contents(tmp_path / "b") == contents(nano_bundle)
    assert hub.served["tokenizer/tokenizer.json"] == len(before["tokenizer/tokenizer.json"])


def test_other_peoples_directories(hub: StandIn, nano_bundle: Path, tmp_path: Path) -> None:
    hub.add(REPO_ID, nano_bundle)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no unfinished pull"):
        pull(tmp_path)
    with pytest.raises(UsageError, match="exists and is not a directory"):
        pull(tmp_path / "notes.txt")
    shutil.copytree(nano_bundle / "experts", tmp_path / "experts")
    pull(tmp_path, force=True)
    assert contents(tmp_path) == contents(nano_bundle) | {"notes.txt": b"mine"}
    assert hub.served[PACK] == 0  # the copies were right


def test_space_is_checked_first(
    hub: StandIn, nano_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO_ID, nano_bundle)
    monkeypatch.setattr("kttools.bundle.hub.pull.shutil.disk_usage", lambda path: Free)
    with pytest.raises(
        ResourceError, match=r"not enough disk: .* needed, 1\.00 KiB available; free"
    ) as caught:
        pull(tmp_path / "b")
    assert caught.value.exit_code == 4
    assert set(hub.served) == {MANIFEST_NAME}
    assert not (tmp_path / "b").exists()


class Free:
    free = 1024


def test_one_pull_at_a_time(hub: StandIn, nano_bundle: Path, tmp_path: Path) -> None:
    hub.add(REPO_ID, nano_bundle)
    with hold_directory(tmp_path / "b"), pytest.raises(KTError, match="another process is writing"):
        pull(tmp_path / "b")
    pull(tmp_path / "b")


def test_equal_files_come_once(hub: StandIn, tmp_path: Path) -> None:
    """A checkpoint this time: three names, two contents, a pickle and a README that stay."""
    data = os.urandom(100_000)
    hub.repos[REPO_ID] = {
        "config.json": b"{}",
        "a.safetensors": data,
        "b.safetensors": data,
        "pytorch_model.bin": data,
        "README.md": b"# hello",
        "../escape.json": b"{}",
    }
    assert pull(tmp_path / "b") == 3
    assert set(contents(tmp_path / "b")) == {"config.json", "a.safetensors", "b.safetensors"}
    assert hub.served["a.safetensors"] + hub.served["b.safetensors"] == len(data)
    assert pull(tmp_path / "b") == 0
    hub.repos[REPO_ID] = {"model.gguf": b"GGUF"}
    with pytest.raises(InvalidInputError, match="holds no bundle and no safetensors checkpoint"):
        pull(tmp_path / "c")


def test_the_cache_of_the_hub(hub: StandIn, nano_bundle: Path, nano_bundle_bf16: Path) -> None:
    hub.add(REPO_ID, nano_bundle_bf16)
    assert cached_snapshot(REPO_ID) is None
    first = cache_puller(REPO_ID)
    first.run(first.plan())
    assert cached_snapshot(REPO_ID) is None, "refs/main is written last"
    note_revision(first.hub)
    assert cached_snapshot(REPO_ID) == first.target
    assert re.search(r"models--org--nano/snapshots/[0-9a-f]{40}$", str(first.target))
    hub.add(REPO_ID, nano_bundle)
    hub.reset_counts()
    second = cache_puller(REPO_ID)
    second.run(second.plan())
    note_revision(second.hub)
    assert cached_snapshot(REPO_ID) == second.target != first.target
    assert contents(second.target) == contents(nano_bundle)
    assert hub.served["tokenizer/tokenizer.json"] == 0, "linked from the other snapshot"
    (second.target / PACK).unlink()
    assert cached_snapshot(REPO_ID) is None


def test_waiting_grows_and_ends(monkeypatch: pytest.MonkeyPatch, hub: StandIn, nano_bundle: Path) -> None:
    hub.add(REPO_ID, nano_bundle)
    waits: list[float] = []
    monkeypatch.setattr(fetch, "_wait", lambda seconds, should_stop: waits.append(seconds))
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 1.0)
    hub.faults.status = {"config": []}
    hub.faults.cuts = {PACK: [0] * 50}
    target = nano_bundle.parent / "waiting"
    with pytest.raises(DownloadError, match="0 of"):
        pull(target)
    assert waits == [1, 2, 4, 8, 16]
    shutil.rmtree(target)
