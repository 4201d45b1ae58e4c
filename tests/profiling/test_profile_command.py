"""kttools profile-experts: the whole, its steps one by one, and the exit code of each kind of mistake."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import kttools_runtime as kt
from kttools import config_file
from kttools.cli import main
from kttools.commands import profile_experts
from kttools.progress import TokenProgress

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def same_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments: object) -> int:
    return main(["profile-experts", *map(str, arguments)])


def spec(samples_dir: Path, *domains: str) -> list[str]:
    return [f"{domain}=jsonl:{samples_dir}/text/{domain}.jsonl#text" for domain in domains]


@pytest.fixture
def data(samples_dir: Path) -> list[str]:
    return [f"--data={text}" for text in spec(samples_dir, "python", "prose")]


SMALL = ("--tokens=1000", "--window=128", "-t1", "--quiet")


@pytest.mark.slow
def test_the_whole_and_its_steps_agree(
    nano_bundle: Path, samples_dir: Path, data: list[str], tmp_path: Path, capsys: Captured
) -> None:
    judged = [f"--eval={text}" for text in spec(samples_dir, "prose", "c")]
    whole, parts, joined = tmp_path / "whole", tmp_path / "part", tmp_path / "joined"
    code = run(nano_bundle, *data, *judged, "-o", whole, *SMALL, "--eval-tokens=600", "--json")
    output = capsys.readouterr()
    assert code in (0, 6), output.err
    document = json.loads(output.out)
    assert document["verdict"]["pass"] == (code == 0)
    kt.load(nano_bundle, threads=1, expert_table=whole / "experts.expert-table.json")
    assert (whole / "report.html").stat().st_size > 1000

    for index in (1, 2):
        assert (
            run("collect", nano_bundle, *data, *SMALL, "--shard", f"{index}/2", "-o", f"{parts}{index}") == 0
        )
    assert run("merge", f"{parts}1", f"{parts}2", "-o", joined) == 0
    assert (joined / "profile.safetensors").read_bytes() == (whole / "profile.safetensors").read_bytes()
    assert run("evaluate", nano_bundle, *judged, "-o", joined, "--window=128", "-t1", "--quiet",
               "--eval-tokens=600") == code  # fmt: skip
    for name in ("experts.expert-table.json", "report.html"):
        assert (joined / name).is_file()
    table = json.loads((joined / "experts.expert-table.json").read_bytes())
    assert table["policy"] == json.loads((whole / "experts.expert-table.json").read_bytes())["policy"]
    assert run("report", joined) == 0
    assert run("export", joined, "-o", tmp_path / "exports") == 0
    assert list((tmp_path / "exports").iterdir())


def test_collect_and_allocate_alone(
    nano_bundle: Path, data: list[str], tmp_path: Path, capsys: Captured
) -> None:
    assert run("collect", nano_bundle, *data, *SMALL[:-1], "-o", tmp_path, "--gram-every=2", "--json") == 0
    output = capsys.readouterr()
    made = json.loads(output.out)
    assert made["recorded_tokens"] > 0
    assert "plan: 2 shards" in output.err
    assert "outputs of one token in 2" in output.err
    assert "the layers stay in memory" in output.err
    assert re.search(r"collect: \d+ tokens recorded at \d+ tokens/s, 0 kept", output.err)
    assert run("collect", nano_bundle, *data, *SMALL, "-o", tmp_path, "--gram-every=2", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["recorded_tokens"], again["kept_tokens"]) == (0, made["recorded_tokens"])
    assert run("merge", tmp_path, "-o", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["shards"] == 2


@pytest.mark.slow
def test_collecting_and_allocating_share_one_model(
    nano_bundle: Path, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kttools.profiling import gather

    loads: list[bool] = []
    opened = gather.open_runner
    monkeypatch.setattr(gather, "open_runner", lambda *a, **k: loads.append(True) or opened(*a, **k))
    assert run(nano_bundle, *data, "-o", tmp_path, *SMALL) == 0
    assert (tmp_path / "experts.expert-table.json").is_file()
    assert len(loads) == 1


def test_layers_are_streamed_when_the_bundle_exceeds_memory(
    nano_bundle: Path, data: list[str], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    assert run("collect", nano_bundle, *data, *SMALL[:-1], "-o", tmp_path) == 0
    assert "one layer at a time" in capsys.readouterr().err
    assert len(list((tmp_path / "shards").iterdir())) == 2


def test_a_disk_too_small_is_refused_before_the_work(
    nano_bundle: Path, data: list[str], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    assert run("collect", nano_bundle, *data, *SMALL, "-o", tmp_path, "--stream-layers") == 4
    assert "of disk needed for hidden states" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_mistakes_and_their_exit_codes(
    nano_bundle: Path, samples_dir: Path, data: list[str], tmp_path: Path, capsys: Captured
) -> None:
    text = f"{samples_dir}/text/prose.jsonl"
    nowhere = ("-o", tmp_path / "out", "-t1", "--quiet")
    for code, message, arguments in (
        (2, "expected I/N", ("collect", nano_bundle, *data, "--shard=3/2", *nowhere)),
        (2, "Missing option '--data'", ("collect", nano_bundle, *nowhere)),
        (2, "Missing argument 'MODEL'", (*data, *nowhere)),
        (2, "no kind", (nano_bundle, "--data=somewhere", *nowhere)),
        (2, "the same domain name", (nano_bundle, *data, data[0], *nowhere)),
        (2, "separated by commas", (nano_bundle, *data, "--pareto=4,x", *nowhere)),
        (3, "row 0 has no field 'body'", (nano_bundle, f"--data=jsonl:{text}#body", *nowhere)),
        (3, "no such file", (nano_bundle, f"--data=jsonl:{text}l", *nowhere)),
        (3, "no such file or directory", (tmp_path / "none", *data, *nowhere)),
        (3, "not a bundle", (samples_dir, *data, *nowhere)),
        (3, "has no shards/", ("merge", tmp_path, *nowhere[:2])),
        (3, "no such file", ("allocate", nano_bundle, *nowhere)),
    ):
        assert run(*arguments) == code, message
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "shards").exists()


def test_a_hub_data_set_that_is_not_here_exits_with_7(
    nano_bundle: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert run("collect", nano_bundle, "--data=hf:org/none", "-o", tmp_path / "out", "-t1", "--quiet") == 7
    error = capsys.readouterr().err
    assert "offline (HF_HUB_OFFLINE), and not in the cache" in error
    assert len(error.strip().splitlines()) == 1


def test_options_come_from_the_config_file(
    nano_bundle: Path, data: list[str], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes from the group's table what it knows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    table = "[profile-experts]\ngram-every = 5\nmean-experts = 4\n"
    Path(config_file.NAME).write_text(table)
    assert run("collect", nano_bundle, *data, *SMALL[:-1], "-o", tmp_path) == 0
    assert "one token in 5" in capsys.readouterr().err
    Path(config_file.NAME).write_text(table + "colour = 1\n")
    assert run("collect", nano_bundle, *data, *SMALL, "-o", tmp_path) == 3
    assert "unknown option 'colour'" in capsys.readouterr().err


def test_progress_off_a_terminal_is_lines(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with TokenProgress("collect", is_quiet=False) as progress:
        progress.start(1000)
        for now in (104.0, 106.0, 107.0, 112.0):
            clock[0] = now
            progress.advance(100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "collect: 20 % of 1000 tokens, 33 tokens/s, 00:24 left",
        "collect: 40 % of 1000 tokens, 33 tokens/s, 00:18 left",
    ]
    with TokenProgress("collect", is_quiet=True) as progress:
        progress.start(10)
        clock[0] = 200.0
        progress.advance(10)
    assert capsys.readouterr().err == ""


def test_the_default_step_needs_no_name() -> None:
    group = profile_experts.command
    assert set(group.commands) == {
        "all", "collect", "merge", "allocate", "evaluate", "report", "install", "export"
    }  # fmt: skip
    assert all(command.get_short_help_str() for command in group.commands.values())
