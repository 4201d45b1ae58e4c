"""chat on a checkpoint: what will not load is not made."""

from pathlib import Path

import pytest

from kttools import cli
from kttools.plan.before_quantize import check_loadable
from kttools_runtime import memory
from kttools_runtime.errors import ResourceError

MIB = 1 << 20


def test_chat_refuses_before_it_quantises(
    nano_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 * MIB)
    assert cli.main(["chat", str(nano_checkpoint), "-p", "x", "-n", "1", "--quiet"]) == 4
    captured = capsys.readouterr()
    assert "its bundle will not load" in captured.err
    assert "no plan fits" in captured.err
    assert [path for path in tmp_path.rglob("*") if path.name == "bundle.json"] == []


def test_a_plan_that_fits_is_named(nano_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_loadable(nano_checkpoint, cache_len=65536)
    monkeypatch.setattr(memory, "available_bytes", lambda: 80 * MIB)
    with pytest.raises(
        ResourceError, match=r"kttools quantize --cpu-format \w+ --gpu-format int4, then load"
    ):
        check_loadable(nano_checkpoint, cache_len=65536, threads=1)
