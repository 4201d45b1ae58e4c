"""Thread pool and expert queue under ThreadSanitizer, AddressSanitizer and UBSan, in own programs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "thread_pool": ["tests/csrc/thread_pool_race.cpp", "csrc/thread_pool.cpp"],
    "expert_queue": ["tests/csrc/expert_queue_race.cpp", "csrc/expert_queue.cpp", "csrc/sim_stream.cpp"],
}


def compiler() -> str:
    path = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        pytest.skip("no C++ compiler")
    return path


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def without_address_randomisation(program: Path) -> list[str]:
    """Older ThreadSanitizers cannot place their shadow memory where the kernel randomises much."""
    setarch = shutil.which("setarch")
    return [setarch, "-R", str(program)] if setarch else [str(program)]


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_is_clean(name: str, sanitizer: str, tmp_path: Path) -> None:
    sources = [str(REPO / source) for source in PROGRAMS[name]]
    program = tmp_path / "race"
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-std=c++17", "-O1", "-g", "-pthread"]
    built = run([compiler(), *flags, f"-I{REPO / 'csrc'}", *sources, "-o", str(program)])
    if built.returncode and "san" in built.stderr and "cannot find" in built.stderr:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    assert built.returncode == 0, built.stderr
    done = run(without_address_randomisation(program))
    if "unexpected memory mapping" in done.stderr or "set personality" in done.stderr:
        pytest.skip(f"the {sanitizer} sanitizer does not run on this kernel")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
