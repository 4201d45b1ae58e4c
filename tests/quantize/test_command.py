"""kttools quantize as a user types it: what is printed where, and the exit codes."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from kttools.bundle.verify import verify_bundle
from tests.quantize.conftest import command, contents, run


def test_plan_then_summary_on_stdout(checkpoint: Path, tmp_path: Path) -> None:
    done = run(checkpoint, tmp_path / "b", "--group-size", "32")
    assert done.returncode == 0, done.stderr
    plan, _, rest = done.stdout.partition("\nRAM")
    assert plan.startswith("source")
    assert "mean rel. rms" in rest
    assert "worst by relative rms:" in rest
    assert verify_bundle(tmp_path / "b").problems == []
    assert "Traceback" not in done.stderr


def test_dry_run_stops_at_the_plan(checkpoint: Path, tmp_path: Path) -> None:
    done = run(checkpoint, tmp_path / "b", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "experts" in done.stdout
    assert "cosine" not in done.stdout
    assert not (tmp_path / "b").exists()


def test_json_is_one_document(checkpoint: Path, tmp_path: Path) -> None:
    planned = run(checkpoint, tmp_path / "b", "--dry-run", "--json")
    done = run(checkpoint, tmp_path / "b", "--json", "--quiet")
    plan, document = json.loads(planned.stdout), json.loads(done.stdout)
    assert "result" not in plan
    assert plan["plan"]["write_bytes"] == document["plan"]["write_bytes"]
    sizes = {path: len(data) for path, data in contents(tmp_path / "b").items()}
    for entry in document["plan"]["packs"] + document["plan"]["shards"]:
        assert sizes[entry["path"]] == entry["bytes"]
    assert document["result"]["written_files"] == 4
    assert document["result"]["roles"]
    assert done.stderr == ""


def test_ktransformers_spelling_and_variables(checkpoint: Path, tmp_path: Path) -> None:
    line = command(checkpoint, tmp_path / "b", "--dry-run")
    line[line.index(str(checkpoint))] = f"--model_path={checkpoint}"
    environment = os.environ | {"KTTOOLS_CPU_FORMAT": "int4"}
    for spelling in ("--model_path=", "--model-path="):
        line = [part.replace("--model_path=", spelling) for part in line]
        done = subprocess.run(line, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "int4_g" in done.stdout


def test_help_has_an_example() -> None:
    done = run(Path("x"), Path("y"), "--help")
    assert "Examples:" in done.stdout
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--cpu-format", "int3"], 2, "int3"),
        (["--group-size", "100"], 2, "100"),
        (["--workers", "0"], 2, "workers"),
    ],
)
def test_usage_errors(checkpoint: Path, tmp_path: Path, options: list[str], code: int, message: str) -> None:
    done = run(checkpoint, tmp_path / "b", *options)
    assert done.returncode == code
    assert message in done.stderr


def test_errors_are_one_line_with_their_code(checkpoint: Path, tmp_path: Path) -> None:
    missing = run(tmp_path / "nothing", tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    taken = run(checkpoint, tmp_path / "full")
    for done, code in ((missing, 3), (taken, 2)):
        assert done.returncode == code
        assert done.stdout == ""
        (line,) = done.stderr.strip().split("\n")
        assert line.startswith("kttools: error: ")


def test_killed_from_outside_and_run_again(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever the moment: SIGKILL after a delay, then the same command ends well."""
    line = command(checkpoint, tmp_path / "b", "--quiet")
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (tmp_path / "b" / "experts").exists() and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.001)
    process.kill()
    process.wait()
    done = run(checkpoint, tmp_path / "b", "--quiet")
    assert done.returncode == 0 or "already holds a bundle" in done.stderr
    assert verify_bundle(tmp_path / "b").problems == []
