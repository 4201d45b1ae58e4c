"""The thread pool under ThreadSanitizer, AddressSanitizer and UBSan, in a program of its own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SOURCES = [REPO / "tests" / "csrc" / "thread_pool_race.cpp", REPO / "csrc" / "thread_pool.cpp"]


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
def test_pool_is_clean(sanitizer: str, tmp_path: Path) -> None:
    program = tmp_path / "race"
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-std=c++17", "-O1", "-g", "-pthread"]
    built = run([compiler(), *flags, f"-I{REPO / 'csrc'}", *map(str, SOURCES), "-o", str(program)])
    if built.returncode and "san" in built.stderr and "cannot find" in built.stderr:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    assert built.returncode == 0, built.stderr
    done = run(without_address_randomisation(program))
    if "unexpected memory mapping" in done.stderr or "set personality" in done.stderr:
        pytest.skip(f"the {sanitizer} sanitizer does not run on this kernel")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
