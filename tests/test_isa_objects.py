"""Each csrc/isa file, compiled: no static initialisers and no weak symbols.

The linker keeps one copy of a weak symbol, possibly the one compiled with AVX-512, and then a CPU without
it dies in code that never asked for it. A static initialiser would run those instructions at import.
"""

import ast
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SOURCES = sorted((REPO / "csrc" / "isa").glob("*.cpp"))


@cache
def isa_flags() -> dict[str, list[str]]:
    """ISA_FLAGS of setup.py, from the assignments above it and nothing else of that file."""
    tree = ast.parse((REPO / "setup.py").read_text(encoding="utf-8"))
    wanted = "AVX2", "AVX512", "AMX", "ISA_FLAGS"
    tables = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) in wanted]
    names: dict[str, dict[str, list[str]]] = {}
    exec(compile(ast.Module(tables, []), "setup.py", "exec"), names)
    return names["ISA_FLAGS"]


def tool(*names: str) -> str:
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    return path


def compile_object(source: Path, target: Path, flags: list[str]) -> Path:
    compiler = os.environ.get("CXX") or tool("g++", "clang++", "c++")
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", f"-I{REPO / 'csrc'}", *flags]
    done = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
    if "unrecognized" in done.stderr and done.returncode:
        pytest.skip(f"{compiler} does not know the flags of {source.stem}")
    assert done.returncode == 0, done.stderr
    return target


def lines_of(program: str, option: str, obj: Path) -> list[str]:
    done = subprocess.run([program, option, str(obj)], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")


def offences(obj: Path) -> list[str]:
    """Weak symbols (nm types V, W, u, v, w with a definition) and initialiser sections of an object file."""
    weak = [line for line in lines_of(tool("nm"), "-C", obj) if len(line) > 17 and line[17] in "VWuv"]
    sections = lines_of(tool("objdump"), "-h", obj)
    return weak + [line for line in sections if ".init_array" in line or ".ctors" in line]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_isa_object_is_self_contained(source: Path, tmp_path: Path) -> None:
    obj = compile_object(source, tmp_path / "isa.o", isa_flags().get(source.stem, []))
    assert not offences(obj)


@pytest.mark.parametrize(
    "code",
    ["inline int f() { return 1; } int g() { return (&f)(); }", "int f(); int x = f();"],
    ids=["weak", "initialiser"],
)
def test_offences_are_seen(code: str, tmp_path: Path) -> None:
    source = tmp_path / "bad.cpp"
    source.write_text(code, encoding="utf-8")
    obj = tmp_path / "bad.o"
    subprocess.run([tool("g++", "clang++", "c++"), "-O0", "-c", str(source), "-o", str(obj)], check=True)
    assert offences(obj)


def test_every_isa_file_is_found() -> None:
    expected = {f"kernels_{name}" for name in ("scalar", "avx2", "avx512", "amx")}
    assert {path.stem for path in SOURCES} >= expected
