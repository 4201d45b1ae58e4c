"""bench model on the sample model, and llama-bench as a peer, played by a script."""

import json
import os
import stat
from pathlib import Path

import pytest

from kttools.bench.llama_bench import LlamaBench, record_of
from kttools.bench.model import SpeedTest, speed_tests
from kttools.cli import main
from kttools_runtime.errors import EngineError, UsageError

FAKE_LLAMA_BENCH = """#!/bin/sh
case "$*" in *broken*) echo "main: failed to load model" >&2; exit 1;; esac
echo "noise" >&2
case "$*" in *"-lm none"*) echo "-lm none" >> "$0.seen";; esac
echo '[{"avg_ts": 2.0, "stddev_ts": 0.1, "n_prompt": '$4', "n_gen": '$6', "n_threads": '$8'}]'
"""


@pytest.fixture
def llama_bench(tmp_path: Path) -> Path:
    path = tmp_path / "llama-bench"
    path.write_text(FAKE_LLAMA_BENCH, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    for name in ("model.gguf", "broken.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    return path


def test_tests_have_llama_bench_names() -> None:
    tests = speed_tests((512, 0, 16), (0, 4))
    assert [test.name for test in tests] == ["pp512", "pp16", "tg4"]
    assert [test.tokens for test in tests] == [512, 16, 4]
    assert speed_tests((0,), (0,)) == []
    assert SpeedTest(0, 4).n_prompt == 0


def test_rows_beside_llama_bench(
    nano_bundle: Path, llama_bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = llama_bench.with_name("model.gguf")
    command = ["bench", "model", str(nano_bundle), "-p", "8", "-n", "2", "-r", "2", "-t", "1", "-o", "json"]
    assert main([*command, "--llama-bench", str(llama_bench), "--gguf", str(gguf)]) == 0
    records = json.loads(capsys.readouterr().out)
    names = [(record["engine"], record["test"]) for record in records]
    assert names == [("kttools", "pp8"), ("llama.cpp", "pp8"), ("kttools", "tg2"), ("llama.cpp", "tg2")]
    ours, theirs = records[:2]
    assert len(ours["samples_ts"]) == 2
    assert ours["model_type"] == "experts int8, shards int4+int8"
    assert ours["model_size"] > 0
    assert theirs["ratio"] == pytest.approx(ours["avg_ts"] / 2.0)
    assert (theirs["n_prompt"], theirs["n_gen"], theirs["n_threads"]) == (8, 0, 1)
    assert theirs["model_filename"] == "model.gguf"


def test_markdown_alone(nano_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model", str(nano_bundle), "-p", "0", "-n", "2", "-r", "1", "-t", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| engine | model | test | threads | tok/s | +- | ours / peer |"
    assert "tg2" in lines[2]
    assert len([line for line in lines if line.startswith("| kttools")]) == 1


def test_arguments_for_llama_bench(
    nano_bundle: Path, llama_bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "model", str(nano_bundle), "-p", "0", "-n", "2", "-r", "1", "-t", "1"]
    assert main([*command, "--llama-args", "-lm none"]) == 2
    assert "--llama-args needs --llama-bench" in capsys.readouterr().err
    peer = ["--llama-bench", str(llama_bench), "--gguf", str(llama_bench.with_name("model.gguf"))]
    assert main([*command, *peer, "--llama-args", "-lm none"]) == 0
    assert "llama-bench -lm none" in capsys.readouterr().out
    assert llama_bench.with_name("llama-bench.seen").read_text() == "-lm none\n"


def test_bad_options(nano_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model", str(nano_bundle), "-p", "0", "-n", "0"]) == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert main(["bench", "model", str(nano_bundle), "--gguf", "x.gguf"]) == 2
    assert "belong together" in capsys.readouterr().err


def test_llama_bench_failures(llama_bench: Path) -> None:
    with pytest.raises(UsageError, match=r"--gguf .*nothing\.gguf: no such file"):
        LlamaBench(llama_bench, llama_bench.with_name("nothing.gguf"))
    with pytest.raises(UsageError, match=r"--llama-bench .*: no such file"):
        LlamaBench(llama_bench.with_name("nothing"), llama_bench)
    broken = LlamaBench(llama_bench, llama_bench.with_name("broken.gguf"))
    with pytest.raises(EngineError, match="ended with 1: main: failed to load model"):
        broken.measure(8, 0, 1, 1)
    with pytest.raises(EngineError, match="did not print JSON"):
        record_of("llama 3")
    with pytest.raises(EngineError, match="something else than the record of one test"):
        record_of("[]")


def test_real_llama_bench() -> None:
    binary, model = os.environ.get("LLAMA_BENCH"), os.environ.get("LLAMA_BENCH_GGUF")
    if not binary or not model:
        pytest.skip("llama-bench: set LLAMA_BENCH and LLAMA_BENCH_GGUF to its binary and a small GGUF")
    record = LlamaBench(Path(binary), Path(model)).measure(8, 0, 1, 1)
    assert record["avg_ts"] > 0
