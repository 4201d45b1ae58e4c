"""Hostile bundles through the command line: exit 3 and one line, whatever was done to them."""

import re
import shutil
from pathlib import Path

import pytest

from kttools.cli import main
from tests.bundle.conftest import sound_bundle  # noqa: F401 - a fixture
from tests.hostile.cases import CASES
from tests.hostile.forge_bundle import complete
from tests.memory import resident_bytes

GROWTH_BYTES = 1 << 30


@pytest.fixture(scope="module")
def talking_bundle(sound_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    bundle = Path(shutil.copytree(sound_bundle, tmp_path_factory.mktemp("hostile") / "bundle"))
    complete(bundle)
    return bundle


def arguments(command: str, bundle: Path) -> list[str]:
    extra = ["-p", "hello", "-n", "1", "--temp", "0", "--cpu_infer", "1"] if command == "chat" else []
    return [command, str(bundle), "--quiet", *extra]


def test_the_sound_bundle_is_accepted(talking_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else everything below would show nothing. (Its weights are noise; what it answers does not matter.)"""
    assert main(arguments("verify", talking_bundle)) == 0
    code = main(arguments("chat", talking_bundle))
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_refused(talking_bundle: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message, commands = CASES[name]
    bundle = Path(shutil.copytree(talking_bundle, tmp_path / "bundle"))
    spoil(bundle)
    before = resident_bytes()
    for command in commands:
        code = main(arguments(command, bundle))
        err = capsys.readouterr().err
        assert code == 3, f"{command}: {err}"
        assert re.search(message, err), f"{command}: {err}"
        assert len(err.splitlines()) == 1, err
        assert err.startswith("kttools: error: ")
        assert err.rstrip("\n").isprintable()
    assert resident_bytes() - before < GROWTH_BYTES


def test_there_are_many() -> None:
    assert len(CASES) >= 100
