"""Pushing: one commit, only what the repository lacks, nothing that is damaged."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kttools.bundle.hub.client import Hub
from kttools.bundle.hub.pull import Puller
from kttools.bundle.hub.push import Pusher
from kttools.bundle.hub.source import HubSource
from kttools_runtime.errors import CorruptFileError, DownloadError, InvalidInputError
from kttools_runtime.manifest import MANIFEST_NAME
from tests.hub.conftest import REPO_ID
from tests.hub.stand_in import LFS_BYTES, StandIn
from tests.hub.test_pull import PACK, contents


def push(bundle: Path) -> int:
    """Pushes; returns how many files had to be sent."""
    pusher = Pusher(Hub(REPO_ID), bundle)
    plan = pusher.plan()
    pusher.run(plan)
    return len(plan.send)


def test_a_push_is_one_commit_and_a_second_one_sends_nothing(
    hub: StandIn, nano_bundle: Path, tmp_path: Path
) -> None:
    files = contents(nano_bundle)
    assert push(nano_bundle) == len(files)
    assert hub.repos[REPO_ID] == files
    assert hub.commits == 1
    hub.reset_counts()
    assert push(nano_bundle) == 0
    assert (hub.commits, hub.uploaded.total()) == (1, 0)
    puller = Puller(Hub(REPO_ID), tmp_path / "b")
    puller.run(puller.plan())
    assert contents(tmp_path / "b") == files


def test_only_changes_are_sent(hub: StandIn, nano_bundle: Path, nano_bundle_bf16: Path) -> None:
    push(nano_bundle)
    hub.reset_counts()
    before, after = contents(nano_bundle), contents(nano_bundle_bf16)
    changed = [path for path in after if before.get(path) != after[path]]
    assert push(nano_bundle_bf16) == len(changed) < len(after)
    assert hub.uploaded.total() == sum(len(after[path]) for path in changed)


def test_an_interrupted_push_goes_on(hub: StandIn, nano_bundle: Path) -> None:
    files = contents(nano_bundle)
    hub.faults.fails_uploads = 1
    with pytest.raises(DownloadError, match=r"403|refuses|upload failed") as caught:
        push(nano_bundle)
    assert caught.value.exit_code == 7
    assert hub.repos[REPO_ID] == {}, "no half of a bundle is ever visible"
    push(nano_bundle)
    assert hub.repos[REPO_ID] == files
    large = {path: data for path, data in files.items() if len(data) > LFS_BYTES}
    assert hub.uploaded.total() == sum(map(len, files.values())), "every content was sent once"
    assert len(large) > 3


def test_a_damaged_bundle_is_not_sent(hub: StandIn, nano_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(nano_bundle, tmp_path / "b"))
    data = bytearray((bundle / PACK).read_bytes())
    data[-5000] ^= 1
    (bundle / PACK).write_bytes(data)
    with pytest.raises(CorruptFileError, match=f"{PACK}: content changed; run kttools verify"):
        push(bundle)
    (bundle / PACK).unlink()
    with pytest.raises(CorruptFileError, match=f"{PACK}: listed in bundle.json but"):
        push(bundle)
    with pytest.raises(InvalidInputError, match="not a bundle"):
        push(tmp_path)
    assert hub.uploaded.total() == 0


def test_without_the_right_to_write(hub: StandIn, nano_bundle: Path, environment: dict[str, str]) -> None:
    """As a user sees it: one line, exit 7."""
    hub.add(REPO_ID, nano_bundle)
    hub.required_token = "secret"
    line = [sys.executable, "-m", "kttools", "bundle", "push", str(nano_bundle), REPO_ID]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.count("\n") == 1
    assert "HF_TOKEN" in done.stderr
    done = subprocess.run(line, env={**environment, "HF_TOKEN": "secret"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "send 0 files" in done.stdout


def test_single_files_for_a_repair(hub: StandIn, nano_bundle: Path, tmp_path: Path) -> None:
    hub.add(REPO_ID, nano_bundle)
    source = HubSource(REPO_ID)
    assert source.manifest_bytes() == (nano_bundle / MANIFEST_NAME).read_bytes()
    data = (nano_bundle / PACK).read_bytes()
    part = tmp_path / "part"
    part.write_bytes(data[:1_000_000])
    received: list[int] = []
    source.fetch(source.manifest().files[PACK], part, received.append)
    assert part.read_bytes() == data
    assert sum(received) == hub.served[PACK] == len(data) - 1_000_000
