"""The fuzzers run for a moment each, and see what is planted."""

from pathlib import Path

import pytest

from tests.fuzz.fuzz import CORPUS, fuzz
from tests.fuzz.targets import TARGETS, Target


@pytest.mark.parametrize("name", TARGETS)
def test_no_finding(tmp_path: Path, name: str) -> None:
    outcome = fuzz(TARGETS[name], tmp_path, 1.5, 1, CORPUS / name)
    assert not outcome.findings, outcome.findings[0][1]
    assert outcome.accepted > 0
    assert outcome.refused > 0


def test_sees_a_planted_crash_and_is_repeatable(tmp_path: Path) -> None:
    def run(file: Path) -> None:
        data = file.read_bytes()
        if len(data) > 8 and data[4] > 200:
            raise ZeroDivisionError("planted")

    target = Target(".bin", lambda _: [bytes(16)], run)
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        outcome = fuzz(target, tmp_path / name, 0.3, 7)
        assert "planted" in outcome.findings[0][1]
        found.append(outcome.findings[0][0])
    assert found[0] == found[1]
