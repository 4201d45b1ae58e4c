"""Memory over many steps and over many processes: the short form of benchmarks/long_run.py."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.long_run import growth
from tests.memory import mapped

REPO = Path(__file__).resolve().parents[1]
# A process that has every page of its packs in use; it says so and waits for a line.
READER = """
import sys
import kttools_runtime as kt
model = kt.load(sys.argv[1], threads=1)
model.logits(list(range(3, 300)))
print("ready", flush=True)
sys.stdin.readline()
"""


def test_the_fit_sees_a_leak_and_no_leak() -> None:
    steps = list(range(100, 20_100, 100))
    warm_up = [300_000_000 + min(step, 4000) * 5000 for step in steps]
    assert abs(growth(steps, warm_up)) < 1e-6
    saw = [bytes_ + (step % 700) * 1000 for step, bytes_ in zip(steps, warm_up, strict=True)]
    assert abs(growth(steps, saw)) < 5
    leak = [bytes_ + step * 40 for step, bytes_ in zip(steps, saw, strict=True)]
    assert growth(steps, leak) == pytest.approx(40, abs=5)


@pytest.mark.parametrize(
    ("name", "steps", "bound_bytes"), [("engine", 6000, 2 << 20), ("chat", 4000, 24 << 20)]
)
def test_memory_stays_put(nano_bundle: Path, tmp_path: Path, name: str, steps: int, bound_bytes: int) -> None:
    """Without bounds on torch's generated kernels a chat grows by 11 MiB in 1000 tokens, 45 MiB here."""
    line = [sys.executable, "-m", "benchmarks.long_run", str(nano_bundle), "--only", name]
    more = ["--steps", str(steps), "--samples", "80", "--bound", str(bound_bytes)]
    done = subprocess.run(
        [*line, *more, "--json", str(tmp_path / "r.json")], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    (record,) = json.loads((tmp_path / "r.json").read_text())
    assert (record["name"], record["steps"], len(record["rss"])) == (name, steps, 80)


@pytest.fixture
def readers(nano_bundle: Path) -> Iterator[list["subprocess.Popen[str]"]]:
    """Grows by start_reader()."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def start_reader(readers: list["subprocess.Popen[str]"], bundle: Path) -> int:
    process = subprocess.Popen(
        [sys.executable, "-c", READER, str(bundle)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    readers.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process.pid


def rollup(pid: int, field: str) -> int:
    """A field of the whole process, in bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.M)
    assert match is not None
    return int(match[1]) * 1024


def test_processes_share_the_page_cache_of_one_bundle(
    nano_bundle: Path, readers: list["subprocess.Popen[str]"]
) -> None:
    """With n readers each maps all packs, and each is charged for an n-th: they are in RAM once."""
    packs = sum(path.stat().st_size for path in nano_bundle.glob("experts/*.ktpack"))
    first = start_reader(readers, nano_bundle)
    alone = mapped(first, ".ktpack")
    assert 0.9 * packs < alone["Rss"] <= packs + 3 * 4096
    pss_alone = rollup(first, "Pss")
    for count in (2, 3):
        pids = [*(process.pid for process in readers), start_reader(readers, nano_bundle)]
        for pid in pids:
            shared = mapped(pid, ".ktpack")
            assert shared["Rss"] == pytest.approx(alone["Rss"], rel=0.05)
            assert shared["Pss"] == pytest.approx(alone["Rss"] / count, rel=0.1)
            assert shared["Private_Dirty"] == 0
    assert rollup(first, "Rss") - alone["Rss"] > 0
    assert rollup(first, "Pss") < pss_alone - alone["Rss"] / 2
