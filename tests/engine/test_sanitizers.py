"""The engine under sanitizers, in a C++ program without Python (native/engine_test.cpp).

AddressSanitizer and UBSan see reads and writes outside exactly sized memory, ThreadSanitizer what the pool
and the phases of a forward leave unordered. The program's blobs are compared with the extension's: other
optimisation, no vector clones of the quantiser, the same bytes.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kttools_runtime import _kernels
from tests.engine import reference as ref
from tests.test_isa_objects import isa_flags

REPO = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("native") / "engine_test.cpp"
LEFT_OUT = {"ceilings.cpp"}  # only measures time; and everything that knows Python, *bindings.cpp
LIMIT_S = 900  # on two idle cores: 20 s to build, 20 s (address) or 60 s (thread) to run
FLAGS = {
    "address,undefined": ["-O1", "-fno-sanitize-recover=all"],
    "thread": ["-O2"],
}
PLANTED = {
    "address,undefined": "int main(int n, char**) { int v[4] = {}; return v[n + 3]; }",
    "thread": (  # often enough that no scheduling hides it
        "#include <thread>\nvolatile int x; void add() { for (int i = 0; i < 100000; ++i) x = x + 1; }\n"
        "int main() { std::thread t(add); add(); t.join(); return 0; }"
    ),
}


def compiler() -> str:
    path = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        pytest.skip("no C++ compiler")
    return path


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)


def sanitize_flags(sanitizer: str) -> list[str]:
    return [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer", "-g", "-pthread", *FLAGS[sanitizer]]


def build(sources: list[Path], sanitizer: str, directory: Path) -> Path:
    """Compiles and links; skips where the compiler has no such sanitizer."""
    common = [compiler(), "-std=c++17", "-ffp-contract=off", f"-I{REPO / 'csrc'}", *sanitize_flags(sanitizer)]
    probe = directory / "probe.cpp"
    probe.write_text("int main() {}", encoding="utf-8")
    done = run([*common, str(probe), "-o", str(directory / "probe")])
    if done.returncode:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")

    def compile_one(source: Path) -> Path:
        flags = isa_flags().get(source.stem, []) if platform.machine() in ("x86_64", "AMD64") else []
        target = directory / f"{source.stem}.o"
        compiled = run([*common, *flags, "-c", str(source), "-o", str(target)])
        assert compiled.returncode == 0, compiled.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    linked = run([*common, *map(str, objects), "-o", str(directory / "program")])
    assert linked.returncode == 0, linked.stderr
    return directory / "program"


def execute(program: Path, sanitizer: str) -> subprocess.CompletedProcess[str]:
    """Older ThreadSanitizers cannot place their shadow memory where the kernel randomises much."""
    setarch = shutil.which("setarch")
    done = run([setarch, "-R", str(program)] if setarch else [str(program)])
    if "unexpected memory mapping" in done.stderr or "set personality" in done.stderr:
        pytest.skip(f"the {sanitizer} sanitizer does not run on this kernel")
    return done


def engine_sources() -> list[Path]:
    tables = sorted((REPO / "csrc" / "isa").glob("*.cpp"))
    if platform.machine() not in ("x86_64", "AMD64"):
        tables = [path for path in tables if path.stem not in isa_flags()]
    sources = sorted((REPO / "csrc").glob("*.cpp"))
    sources = [p for p in sources if p.name not in LEFT_OUT and not p.stem.endswith("bindings")]
    return [*sources, *tables, PROGRAM]


def values(seed: int, shape: tuple[int, int], scale: np.float32) -> ref.Array:
    """The program's weights: `value` of engine_test.cpp."""
    h = np.arange(shape[0] * shape[1], dtype=np.uint32) * np.uint32(2654435761)
    h += np.uint32(seed * 40503)
    h ^= h >> np.uint32(15)
    h *= np.uint32(2246822519)
    h ^= h >> np.uint32(13)
    unit = ((h >> np.uint32(16)).astype(np.float32) - np.float32(32768)) / np.float32(32768)
    return (unit * scale).reshape(shape)


def blob_hash(name: str) -> str:
    """FNV-1a of the blob of the program's first expert, packed by the extension."""
    hidden, inner = 72, 40
    into, out = (np.float32(1.7) / np.sqrt(np.float32(size)) for size in (hidden, inner))
    gate, up = values(5, (inner, hidden), into), values(6, (inner, hidden), into)
    blob = ref.aligned(_kernels.expert_bytes(name, hidden, inner))
    _kernels.pack_expert(name, gate, up, values(7, (hidden, inner), out), blob)
    result = 1469598103934665603
    for byte in blob.tobytes():
        result = (result ^ byte) * 1099511628211 & (2**64 - 1)
    return f"{result:016x}"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", FLAGS)
def test_engine_is_clean(sanitizer: str, tmp_path: Path) -> None:
    done = execute(build(engine_sources(), sanitizer, tmp_path), sanitizer)
    expected = [*(f"{name} {blob_hash(name)}" for name in ref.FORMATS), "ok"]
    assert (done.returncode, done.stdout.splitlines()) == (0, expected), done.stderr


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_planted_errors_are_seen(sanitizer: str, tmp_path: Path) -> None:
    source = tmp_path / "planted.cpp"
    source.write_text(PLANTED[sanitizer], encoding="utf-8")
    done = execute(build([source], sanitizer, tmp_path), sanitizer)
    assert done.returncode != 0
    assert "Sanitizer" in done.stderr or "runtime error" in done.stderr
