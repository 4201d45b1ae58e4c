"""The rules of docs/architecture.md that a machine can hold: what imports what, what is never written.

Every rule is a function from source text to the offending lines, and comes with a planted offence that it
must see.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
RUNTIME = ("runtime/kttools_runtime/**/*.py",)
SHIPPED = (*RUNTIME, "kttools/**/*.py")
PYTHON = (*SHIPPED, "setup.py", "tests/**/*.py", "benchmarks/**/*.py", "docs/**/*.py")
CSRC = ("csrc/**/*.cpp", "csrc/**/*.h")
ISA = ("csrc/isa/*",)


def files(patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in REPO.glob(pattern)})


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every absolute import anywhere in the tree, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


def importing(*modules: str) -> Callable[[str], list[int]]:
    """Lines that import one of these modules or anything below them."""

    def check(source: str) -> list[int]:
        found = imports(ast.parse(source))
        return [line for line, name in found if any(name == m or name.startswith(m + ".") for m in modules)]

    return check


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute chain; nothing in front when it starts at a call or an index."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def mentioning(*names: str) -> Callable[[str], list[int]]:
    """Lines that use one of these dotted names (`print`, `torch.load`), not methods of the same name."""

    def check(source: str) -> list[int]:
        uses = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name | ast.Attribute))
        return sorted({node.lineno for node in uses if dotted(node) in names})

    return check


def passing_keyword(*names: str) -> Callable[[str], list[int]]:
    """Lines with a call that passes one of these keywords."""

    def check(source: str) -> list[int]:
        calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        return [call.lineno for call in calls if any(keyword.arg in names for keyword in call.keywords)]

    return check


def code_only(source: str) -> str:
    """C++ with comments and string literals blanked, line numbers kept."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda match: "\n" * match[0].count("\n"), source, flags=re.S)


def matching(regex: str, strip: bool = True) -> Callable[[str], list[int]]:
    """Lines of C++ that match, outside comments and strings unless `strip` is false."""

    def check(source: str) -> list[int]:
        text = code_only(source) if strip else source
        return [number for number, line in enumerate(text.split("\n"), 1) if re.search(regex, line)]

    return check


def not_ascii(source: str) -> list[int]:
    return [number for number, line in enumerate(source.split("\n"), 1) if not line.isascii()]


C_HEADERS = "immintrin|math|float|string|cstddef|cstdint|cstring|cmath|cfloat"
ISA_INCLUDES = rf'"[\w./]+"|<(?:{C_HEADERS})(?:\.h)?>'
PICKLES = "pickle", "cPickle", "dill", "shelve", "marshal", "joblib"


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    where: tuple[str, ...]
    check: Callable[[str], list[int]]
    planted: str
    allowed_in: tuple[str, ...] = ()


RULES = [
    Rule(
        "runtime_never_imports_the_toolkit",
        RUNTIME,
        importing("kttools", "click", "datasets", "transformers"),
        planted="def f():\n    import kttools.cli",
    ),
    Rule("nothing_imports_runtime", PYTHON, importing("runtime"), planted="from runtime.pack import x"),
    Rule("no_pickle", SHIPPED, importing(*PICKLES), planted="import pickle"),
    Rule(
        "no_unsafe_load",
        SHIPPED,
        mentioning("torch.load", "eval", "exec", "yaml.load", "os.system"),
        planted="w = torch.load(path)",
    ),
    Rule(
        "no_remote_code",
        SHIPPED,
        passing_keyword("trust_remote_code", "allow_pickle", "shell"),
        planted="load(p, trust_remote_code=True)",
    ),
    Rule(
        "runtime_never_prints", RUNTIME, mentioning("print", "sys.stdout", "sys.stderr"), planted="print(1)"
    ),
    Rule(
        "runtime_never_exits", RUNTIME, mentioning("sys.exit", "exit", "quit", "os._exit"), planted="exit()"
    ),
    Rule(
        "environment_is_read_in_one_place",
        RUNTIME,
        mentioning("os.environ", "os.getenv"),
        planted="a = os.environ['A']",
        allowed_in=("runtime/kttools_runtime/env.py",),
    ),
    Rule("ascii_python", PYTHON, not_ascii, planted="x = '\u00e9'"),
    Rule("ascii_cpp", CSRC, not_ascii, planted="// caf\u00e9"),
    Rule(
        "cpp_never_prints",
        CSRC,
        matching(r"\b(printf|fprintf|puts|fputs|cout|cerr|clog|perror)\b"),
        planted='void f() { std::cerr << "x"; }',
    ),
    Rule(
        "pybind_files",
        CSRC,
        matching(r"#\s*include\s+<pybind11", strip=False),
        planted="#include <pybind11/numpy.h>",
        allowed_in=(
            "csrc/arrays.h",
            "csrc/bindings.cpp",
            "csrc/dequantize_bindings.cpp",
            "csrc/hybrid_bindings.cpp",
            "csrc/step_arguments.h",
            "csrc/step_bindings.cpp",
        ),
    ),
    Rule(
        "isa_files_hold_no_stl",
        ISA,
        matching(rf"#\s*include\s+(?!{ISA_INCLUDES})", strip=False),
        planted="#include <vector>",
    ),
    Rule(
        "kernels_start_no_thread_and_allocate_nothing",
        ISA,
        matching(r"\b(thread|async|pthread_create|mutex|new|malloc)\b"),
        planted="std::thread worker(f);",
    ),
]
by_name = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


@by_name
def test_rule_holds(rule: Rule) -> None:
    found = files(rule.where)
    assert found, f"{rule.name} looks at {rule.where} and finds no file"
    offences = [
        f"{name}:{line}"
        for path in found
        if (name := path.relative_to(REPO).as_posix()) not in rule.allowed_in
        for line in rule.check(path.read_text(encoding="utf-8"))
    ]
    assert not offences


@by_name
def test_rule_sees_planted_offence(rule: Rule) -> None:
    assert rule.check(rule.planted)
    assert not rule.check("")


def test_rules_leave_innocent_code_alone() -> None:
    assert not mentioning("eval", "print")("model.eval()\nfingerprint = x.print")
    assert not importing("kttools")("import kttools_runtime\nfrom .kttools import a")
    assert not matching(r"\bprintf\b")('// printf\nconst char* s = "printf";')


def test_command_line_starts_without_the_heavy_libraries() -> None:
    heavy = "torch", "transformers", "datasets", "kttools_runtime._kernels"
    code = f"import sys, kttools.cli; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_importing_the_runtime_reads_no_environment_and_starts_no_thread() -> None:
    code = "import threading, kttools_runtime; print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def shell_lines(page: Path) -> list[str]:
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    return [line.removeprefix("$ ").strip() for block in blocks for line in block.split("\n")]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pages_name_only_commands_that_exist(page: str) -> None:
    from kttools.cli import COMMANDS

    targets = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.M))
    lines = shell_lines(REPO / page)
    made = {word for line in lines for word in re.findall(r"\bmake ([a-z]+)", line)}
    called = {word for line in lines for word in re.findall(r"\bkttools ([a-z][a-z-]+)", line)}
    assert made | called, f"{page} shows no command"
    assert made <= targets
    assert called <= set(COMMANDS)


def test_ci_runs_what_the_readme_says() -> None:
    script = (REPO / ".ci" / "run").read_text(encoding="utf-8")
    readme = "\n".join(shell_lines(REPO / "README.md"))
    for command in ("make demo", "make test"):
        assert command in readme
        assert command in script
