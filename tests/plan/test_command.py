"""kttools plan as a user types it."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from kttools import cli
from tests.plan.released_v3 import DEEPSEEK_V3

MACHINE = ("--bandwidth", "250", "--tops", "50", "-t", "8", "--quiet")


@pytest.fixture
def v3(tmp_path: Path) -> str:
    (tmp_path / "DeepSeek-V3").mkdir()
    (tmp_path / "DeepSeek-V3" / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    return str(tmp_path / "DeepSeek-V3")


def plan(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *line, *MACHINE])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_json(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = plan(capsys, *line, "--json")
    return code, json.loads(out)


def test_a_plan_that_fits(v3: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, v3, "--dram", "768G")
    assert (code, err) == (0, "")
    assert "fits" in out
    assert "at most" in out
    assert "not measured" in out
    assert f"kttools quantize {v3} -o DeepSeek-V3-int8 --cpu-format int8 --gpu-format int4" in out


def test_parts_add_up(v3: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = as_json(capsys, v3, "--dram", "1T", "--cache_lens", "1000", "--disk", "4")
    assert code == 0
    for key in ("ram_bytes", "bundle_bytes"):
        total = document[key].pop("total")
        assert sum(document[key].values()) == total
    stored = document["bundle_bytes"]
    assert document["load_s"] == pytest.approx((stored["experts"] + stored["shards"]) / 4e9)
    assert document["ram_limit_bytes"] == 1 << 40


def test_too_little_ram_names_the_nearest_plan_and_that_plan_fits(
    v3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = plan(capsys, v3, "--dram", "512G")
    assert code == 4
    assert "does not fit" in out
    options = shlex.split(err.partition("nearest plan that fits: ")[2].partition(" (")[0])
    assert options[:2] == ["--cpu-format", "int4_g32"]
    assert as_json(capsys, v3, "--dram", "512G", *options)[0] == 0


def test_a_shorter_cache_comes_before_smaller_weights(v3: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, document = as_json(capsys, v3, "--dram", "1T", "--cache_lens", "65536")
    short = f"{(document['ram_bytes']['total'] >> 20) - 2000}M"
    code, _, err = plan(capsys, v3, "--dram", short, "--cache_lens", "65536")
    assert code == 4
    assert "--cpu-format int8 --gpu-format int4 --cache_lens 32768" in err


def test_nothing_fits(v3: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = plan(capsys, v3, "--dram", "8G")
    assert code == 4
    assert "no plan fits, the smallest needs" in err


def test_a_bundle_needs_no_quantize(nano_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = as_json(capsys, str(nano_bundle), "--dram", "8G")
    assert code == 0
    assert [shlex.split(line)[1] for line in document["commands"]] == ["chat"]
    code, _, err = plan(capsys, str(nano_bundle), "--cpu-format", "int4")
    assert code == 2
    assert "formats are fixed" in err
    code, _, err = plan(capsys, str(nano_bundle), "--dram", "100M")
    assert code == 4
    assert "--cpu-format" not in err


@pytest.mark.parametrize("text", ["512", "G", "-1G", "1.2.3G", "0G", "many"])
def test_sizes_need_a_unit(text: str, v3: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = plan(capsys, v3, f"--dram={text}")
    assert code == 2
    assert "512G" in err


def test_what_is_not_given_is_measured(
    nano_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kttools.plan import ceilings, speed

    monkeypatch.setattr(speed, "PROBE_BYTES", 64 << 20)
    monkeypatch.setattr(ceilings, "cache_dir", lambda: tmp_path)
    line = ["plan", str(nano_bundle), "-t", "1", "--bandwidth", "7", "--json", "--quiet", "--dram", "8G"]
    assert cli.main(line) == 0
    bounds = json.loads(capsys.readouterr().out)["upper_bounds"]
    assert bounds["bandwidth_bytes_s"] == 7e9
    assert 1e9 < bounds["compute_ops_s"] < 1e15
    assert bounds["source"] == "given, measured now"

    monkeypatch.setattr(speed, "measure", lambda *key: pytest.fail("measured what was remembered"))
    assert cli.main(line) == 0
    again = json.loads(capsys.readouterr().out)["upper_bounds"]
    assert again["compute_ops_s"] == bounds["compute_ops_s"]
    assert "measured here on" in again["source"]


def test_a_container_limits_what_is_free(
    nano_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kttools_runtime import memory

    monkeypatch.setattr(memory, "_cgroup_headroom", lambda root: [100 << 20])
    code, document = as_json(capsys, str(nano_bundle))
    assert code == 4
    assert document["ram_limit_bytes"] == 100 << 20
