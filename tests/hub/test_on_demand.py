"""A hub id where a model is expected: plan, consent, pull, and the answer; with real processes."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from kttools.model_source import resolve_model
from tests.hub.conftest import REPO_ID
from tests.hub.stand_in import StandIn

ASK = ["chat", REPO_ID, "-p", "What is a mixture-of-experts model?", "-n", "8", "--temp", "0"]


def run(environment: dict[str, str], *args: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "kttools", *args]
    return subprocess.run(line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_without_a_terminal_only_yes_fetches(
    hub: StandIn, environment: dict[str, str], nano_bundle: Path
) -> None:
    hub.add(REPO_ID, nano_bundle)
    refused = run(environment, *ASK)
    assert (refused.returncode, refused.stdout) == (7, "")
    assert re.fullmatch(
        r"kttools: error: org/nano at [0-9a-f]{12}: fetch \d+ files, [\d.]+ MiB, into .* free\); nothing was "
        r"fetched: say --yes, or fetch it first: kttools bundle pull org/nano\n",
        refused.stderr,
    )
    assert sum(count for path, count in hub.served.items() if path != "bundle.json") == 0
    answered = run(environment, *ASK, "--yes")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout == run(environment, "chat", str(nano_bundle), *ASK[2:]).stdout
    hub.reset_counts()
    again = run(environment, *ASK)
    assert again.stdout == answered.stdout
    assert hub.requests == [], "what is in the cache is not asked for"
    offline = run({**environment, "HF_HUB_OFFLINE": "1"}, "chat", "org/other", "-p", "x", "--yes")
    assert offline.returncode == 7
    assert offline.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE is set" in offline.stderr


def test_on_a_terminal_the_user_is_asked(
    hub: StandIn, environment: dict[str, str], nano_bundle: Path
) -> None:
    hub.add(REPO_ID, nano_bundle)
    for answer, status in (("n", 7), ("y", 0)):
        pid, terminal = pty.fork()
        if pid == 0:
            os.execvpe(sys.executable, [sys.executable, "-m", "kttools", *ASK], environment)
        seen = ""
        try:
            while data := os.read(terminal, 4096):
                seen += data.decode()
                if answer and "Fetch it now? [y/N]" in seen:
                    os.write(terminal, f"{answer}\n".encode())
                    answer = ""
        except OSError:  # the program closed its side
            pass
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status, seen


def test_a_checkpoint_is_pulled_for_commands_that_take_one(
    hub: StandIn, environment: dict[str, str], nano_checkpoint: Path, tmp_path: Path
) -> None:
    hub.add(REPO_ID, nano_checkpoint)
    done = run(environment, "quantize", REPO_ID, "-o", str(tmp_path / "b"), "--yes", "--dry-run")
    assert done.returncode == 0, done.stderr
    snapshot = resolve_model(REPO_ID, may_fetch=False)
    assert snapshot.parent.name == "snapshots"
    assert (snapshot / "config.json").read_bytes() == (nano_checkpoint / "config.json").read_bytes()
