"""Death and full disks at any moment in every writer: always the old state, the new one, or one that goes on.

CRASH_KILLS sets the number of kills of each of quantize, unpack and pull (default 6; the others get a
third); half of them strike before or in the middle of a random call, half at a random time. After each kill
 * every file under a final name is whole: byte for byte the old one or the new one,
 * a rerun ends with exactly the bytes of an undisturbed run, and nothing besides,
 * and no finished unit (pack, shard, file) is made or fetched again.
"""

import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kttools.bundle.verify import verify_bundle
from tests.crash.faults import Fault
from tests.crash.scenarios import REPO_ID, SCENARIOS, Contents, contents, make_inputs, visible
from tests.crash.worker import Worker
from tests.hub.stand_in import StandIn

KILLS = int(os.environ.get("CRASH_KILLS", "6"))
CHEAP = max(2, KILLS // 3)
MAIN = ("quantize", "unpack", "pull")
REFUSE = ("quantize", "pack", "convert", "subset")  # what is there: no rerun when the last name was given
KILLED = -9


@dataclass(frozen=True, slots=True)
class Rig:
    """The worker, the stand-in of the hub, and the shared inputs."""

    worker: Worker
    hub: StandIn
    inputs: Path


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """What a run without faults does: contents before and after, bytes written, how many calls, how long."""

    before: Contents
    after: Contents
    bytes: int
    units: int | None  # frames that unpack decodes
    calls: int
    seconds: float


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    inputs = tmp_path_factory.mktemp("inputs")
    make_inputs(inputs)
    hub = StandIn()
    hub.add(REPO_ID, inputs / "bundle")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("KTTOOLS_", "HF_"))}
    with hub.running(), Worker({**environment, "HF_ENDPOINT": hub.endpoint}) as worker:
        yield Rig(worker, hub, inputs)


@pytest.fixture(scope="module")
def undisturbed(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Undisturbed]:
    found = {}
    for name, scenario in SCENARIOS.items():
        folder = tmp_path_factory.mktemp(name) / "f"
        scenario.prepare(folder, rig.inputs)
        before = contents(folder)
        outcome = rig.worker.ask(name, folder)
        report = outcome["children"][0]
        assert report["exit"] == 0, f"{name}: {report}"
        after = contents(folder)
        assert after == visible(after), f"{name} leaves temporary files"
        assert after != before
        new = sum((folder / path).stat().st_size for path in after if path not in before)
        found[name] = Undisturbed(before, after, new, report["redone"], report["calls"], outcome["seconds"])
    return found


def check_names(name: str, folder: Path, run: Undisturbed) -> None:
    """Files under final names have the old content or the new one; a manifest stands only over a whole."""
    if name == "install":  # in between the bundle is a sound one without a default table
        assert verify_bundle(folder / "b").problems == []
        return
    now = visible(contents(folder))
    for path, found in now.items():
        assert found in (run.before.get(path), run.after.get(path)), f"{name}: {path} is broken"
    if "b/bundle.json" in now and name not in ("repair", "sign"):
        assert now == run.after, f"{name}: a manifest stands over something else"


def check_rerun(rig: Rig, name: str, folder: Path, run: Undisturbed) -> None:
    """Completes the work; counts what is done again."""
    scenario = SCENARIOS[name]
    finished = scenario.finished(folder)
    rig.hub.served.clear()
    report = rig.worker.ask(name, folder)["children"][0]
    assert report["exit"] == 0, f"{name}: the rerun failed: {report}"
    assert contents(folder) == run.after
    if name == "quantize":
        for path, mark in finished.items():
            status = (folder / path).stat()
            assert (status.st_ino, status.st_mtime_ns) == mark, f"{path} was finished and is made again"
    elif name == "pull":
        again = [p for p in rig.hub.served if p != "bundle.json" and run.after[f"b/{p}"] in finished]
        assert again == [], "finished and fetched again"
    elif name == "unpack":
        # Every file of this bundle is one frame of data at least.
        assert run.units is not None
        assert report["redone"] <= run.units - len(finished.keys() - {"bundle.json"})


def strikes(name: str, run: Undisturbed, count: int) -> Iterator[tuple[Fault, float | None]]:
    """Faults at calls and at times, from a fixed seed."""
    chance = random.Random(f"{name} {count}")
    for number in range(count):
        if number % 2:
            yield Fault(), chance.uniform(0, run.seconds)
        else:
            yield Fault(chance.choice(["kill", "torn"]), chance.randint(1, run.calls)), None


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_killed_at_any_moment(
    rig: Rig, undisturbed: dict[str, Undisturbed], tmp_path: Path, name: str
) -> None:
    run = undisturbed[name]
    killed = 0
    for number, (fault, seconds) in enumerate(strikes(name, run, KILLS if name in MAIN else CHEAP)):
        folder = tmp_path / str(number)
        SCENARIOS[name].prepare(folder, rig.inputs)
        report = rig.worker.ask(name, folder, fault, seconds)["children"][0]
        assert report["exit"] in (KILLED, 0), report
        killed += report["exit"] == KILLED
        check_names(name, folder, run)
        if report["exit"] == KILLED and not (name in REFUSE and is_done(folder, run)):
            check_rerun(rig, name, folder, run)
        remove(folder)
    print(f"{name}: {killed} kills")
    assert killed >= 1


def is_done(folder: Path, run: Undisturbed) -> bool:
    """The last name was given; what may be left is hidden."""
    return visible(contents(folder)) == run.after


@pytest.mark.parametrize(("kind", "status"), [("full", 4), ("read-only", 1)])
@pytest.mark.parametrize("name", list(SCENARIOS))
def test_no_space_or_no_right_from_some_call_on(
    rig: Rig, undisturbed: dict[str, Undisturbed], tmp_path: Path, name: str, kind: str, status: int
) -> None:
    run = undisturbed[name]
    chance = random.Random(f"{name} {kind}")
    failed = 0
    for number in range(CHEAP):
        folder = tmp_path / str(number)
        SCENARIOS[name].prepare(folder, rig.inputs)
        at = 1 if number == 0 else chance.randint(1, run.calls)
        report = rig.worker.ask(name, folder, Fault(kind, at))["children"][0]
        if report["exit"] == 0:  # only tidying up was left
            continue
        failed += 1
        assert report["status"] == status, f"{name} at call {at} of {run.calls}: {report}"
        assert report["message"].count("\n") == 0
        assert "Error" not in report["message"]
        check_names(name, folder, run)
        if not SCENARIOS[name].is_resumable and kind == "full":
            assert contents(folder) == visible(contents(folder)), "something hidden is left"
        if not is_done(folder, run):
            check_rerun(rig, name, folder, run)
        remove(folder)
    assert failed >= 1


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_two_at_the_same_target(
    rig: Rig, undisturbed: dict[str, Undisturbed], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "f"
    SCENARIOS[name].prepare(folder, rig.inputs)
    reports = rig.worker.ask(name, folder, count=2)["children"]
    assert any(report["exit"] == 0 for report in reports), reports
    for report in reports:
        assert report["exit"] in (0, 1, 2), report
        if report["exit"]:
            assert "another process" in report["message"] or "already" in report["message"], report
    assert contents(folder) == undisturbed[name].after


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB; skips where mounting is not allowed."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("name", ["quantize", "unpack", "pull", "pack", "convert"])
def test_a_really_full_disk(
    rig: Rig, undisturbed: dict[str, Undisturbed], small_disk: Path, name: str
) -> None:
    """Filled but for what is half enough; some of these see it before they begin."""
    run = undisturbed[name]
    folder = small_disk / "f"
    SCENARIOS[name].prepare(folder, rig.inputs)
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - run.bytes // 2)))
    report: dict[str, Any] = rig.worker.ask(name, folder)["children"][0]
    assert report["status"] == 4, report
    check_names(name, folder, run)
    filler.unlink()


def remove(folder: Path) -> None:
    subprocess.run(["rm", "-rf", str(folder)], check=True)
