"""docs/security.md names tests as its evidence: each of them exists."""

import re
from pathlib import Path

NAMED = re.compile(r"`(test_\w+)`(?: \((tests/[\w/.]+)\))?")


def defined(folder: Path) -> set[str]:
    files = [folder] if folder.is_file() else folder.rglob("test_*.py")
    return {name for file in files for name in re.findall(r"^ *def (test_\w+)\(", file.read_text(), re.M)}


def test_every_named_test_exists(repo: Path) -> None:
    named = NAMED.findall((repo / "docs/security.md").read_text())
    assert len(named) > 40
    everywhere = defined(repo / "tests")
    for name, place in named:
        known = defined(repo / place) if place else everywhere
        assert name in known, f"docs/security.md names {name} {place}, which is not there"


def test_sees_a_missing_test(repo: Path) -> None:
    assert NAMED.findall("`test_nowhere` (tests/hostile)") == [("test_nowhere", "tests/hostile")]
    assert "test_nowhere" not in defined(repo / "tests/hostile")
