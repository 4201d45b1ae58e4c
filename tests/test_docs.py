"""The generated page is current, and links between the pages lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("samples/*.md")])


def test_command_reference_is_current() -> None:
    command = [sys.executable, str(REPO / "docs" / "generate_cli.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_annotated_tree_names_only_what_exists() -> None:
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```text\nkttools/ .*?^```", readme, re.S | re.M)
    assert block, "README has no annotated tree"
    paths = re.findall(r"^(\S+/)", block[0], re.M)
    assert len(paths) > 5
    assert [path for path in paths if not (REPO / path).is_dir()] == []
