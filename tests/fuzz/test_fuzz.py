"""The fuzzers run for a moment each, and see what is planted."""

from pathlib import Path

import pytest

from kttools_runtime.errors import InvalidInputError
from tests.fuzz.dictionary import words
from tests.fuzz.fuzz import CORPUS, fuzz
from tests.fuzz.run import seconds_each
from tests.fuzz.targets import TARGETS, Target


@pytest.mark.parametrize("name", TARGETS)
def test_no_finding(tmp_path: Path, name: str) -> None:
    outcome = fuzz(TARGETS[name], tmp_path, 1.5, 1, CORPUS / name, None, words(name))
    assert not outcome.findings, outcome.findings[0][1]
    assert outcome.accepted > 0
    assert outcome.refused > 0


@pytest.mark.parametrize("name", TARGETS)
def test_every_parser_has_a_corpus_and_a_dictionary(name: str) -> None:
    assert len(words(name)) >= 10
    assert sum(file.is_file() for file in (CORPUS / name).iterdir()) >= 5


@pytest.mark.parametrize(("targets", "expected"), [(4, 60), (7, 60), (8, 60), (9, 48), (20, 24)])
def test_all_targets_fit_four_minutes(targets: int, expected: float) -> None:
    assert seconds_each(targets, 60.0, 2, 240.0) == expected


def test_a_refusal_in_new_words_becomes_a_seed(tmp_path: Path) -> None:
    """Two checks in a row: the second is met only from what passed the first."""

    def run(file: Path) -> None:
        data = file.read_bytes()
        for at, name in enumerate(("first", "second")):
            if data[4 * at : 4 * at + 2] != b"\xf7\x11":
                raise InvalidInputError(f"{file}: the {name} mark is missing at {at}")
        raise ZeroDivisionError("reached")

    outcome = fuzz(Target(".bin", lambda _: [bytes(8)], run), tmp_path, 60.0, 3, None, 600, [b"\xf7\x11"])
    assert "reached" in outcome.findings[0][1]


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
