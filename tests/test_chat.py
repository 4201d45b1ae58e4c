"""kttools chat as users run it: one prompt, a pipe, and a session in a pseudo-terminal."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

QUESTION = "What is a mixture-of-experts model?"
DEADLINE_S = 120


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The user's surroundings: nothing set, a cache of its own, two threads at most."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KTTOOLS_")}
    changes = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    return {**kept, **changes, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}


def chat(
    environment: dict[str, str], *args: str | Path, stdin: bytes | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kttools", "chat", *map(str, args)]
    given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=DEADLINE_S, **given)  # type: ignore[call-overload]
    return subprocess.CompletedProcess(
        command, done.returncode, done.stdout.decode(), done.stderr.decode("utf-8", "replace")
    )


@pytest.fixture(scope="module")
def answer(nano_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the sample model answers greedily."""
    surroundings = {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    done = chat(surroundings, nano_bundle, "-p", QUESTION, "-n", "64", "--temp", "0")
    assert done.returncode == 0, done.stderr
    assert "experts" in done.stdout, "the model knows this one by heart"
    return done.stdout


def test_one_prompt(environment: dict[str, str], nano_bundle: Path, answer: str) -> None:
    done = chat(environment, nano_bundle, "-p", QUESTION, "-n", "64", "--temp", "0")
    assert done.stdout == answer
    speeds = r"^prompt \d+ tokens, [\d.]+ tok/s; generation \d+ tokens, [\d.]+ tok/s; load [\d.]+ s; "
    assert re.search(speeds + r"time to first token [\d.]+ s$", done.stderr, re.M)


def test_a_chinese_answer_comes_whole(environment: dict[str, str], nano_bundle: Path) -> None:
    question = "\u4ec0\u4e48\u662f\u6df7\u5408\u4e13\u5bb6\u6a21\u578b\uff1f"
    done = chat(environment, nano_bundle, "-p", question, "-n", "48", "--temp", "0")
    assert done.returncode == 0, done.stderr
    assert "\u4e13\u5bb6" in done.stdout
    assert "\ufffd" not in done.stdout


def test_every_way_to_give_the_prompt(
    environment: dict[str, str], nano_bundle: Path, answer: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(QUESTION + "\n")
    greedy = ("-n", "64", "--temp", "0", "--quiet")
    ways: list[tuple[tuple[str | Path, ...], bytes | None]] = [
        ((nano_bundle, "--prompt_file", file), None),
        (("--model_path", nano_bundle, "--prompt-file", file), None),
        (("-m", nano_bundle), (QUESTION + "\n").encode()),
        ((nano_bundle, "-f", "-"), QUESTION.encode()),
    ]
    for args, stdin in ways:
        done = chat(environment, *args, *greedy, stdin=stdin)
        assert (done.stdout, done.stderr, done.returncode) == (answer, "", 0), args


def test_flags_that_must_not_change_the_answer(
    environment: dict[str, str], nano_bundle: Path, answer: str
) -> None:
    for extra in (("--cpu_infer", "1"), ("--chunk_size", "3"), ("--cache_lens", "256", "--seed", "4")):
        done = chat(environment, nano_bundle, "-p", QUESTION, "-n", "64", "--temp", "0", *extra)
        assert done.stdout == answer, extra


def test_a_seed_repeats(environment: dict[str, str], nano_bundle: Path) -> None:
    args = (nano_bundle, "-p", "Tell me a story.", "-n", "24", "--temp", "1", "--seed")
    first, again, other = (chat(environment, *args, seed).stdout for seed in ("5", "5", "6"))
    assert first == again
    assert first != other


def test_threads_do_not_change_a_sampled_answer(environment: dict[str, str], nano_bundle: Path) -> None:
    args = (nano_bundle, "-p", "Tell me a story.", "-n", "32", "--temp", "0.8", "--seed", "1", "--cpu_infer")
    texts = {chat(environment, *args, threads).stdout for threads in ("1", "2", "3")}
    assert len(texts) == 1


def test_json(environment: dict[str, str], nano_bundle: Path, answer: str) -> None:
    done = chat(environment, nano_bundle, "-p", QUESTION, "-n", "64", "--temp", "0", "--json")
    document = json.loads(done.stdout)
    assert document["text"] + "\n" == answer
    assert document["finish_reason"] in ("stop", "length")
    assert document["generated_tokens"] > 0
    assert document["thinking"] == ""


def test_raw_and_force_think(environment: dict[str, str], nano_bundle: Path) -> None:
    done = chat(environment, nano_bundle, "--raw", "-p", "In the beginning", "-n", "8", "--temp", "0")
    assert done.returncode == 0, done.stderr
    done = chat(environment, nano_bundle, "--force_think", "-p", QUESTION, "-n", "8", "--temp", "0")
    assert done.stdout.startswith("<think>\n")


def test_a_forced_kernel_table(environment: dict[str, str], nano_bundle: Path) -> None:
    done = chat(environment, nano_bundle, "-p", QUESTION, "-n", "8", "--temp", "0", "--isa", "scalar")
    assert done.returncode == 0, done.stderr
    done = chat(environment, nano_bundle, "-p", "x", "--isa", "sse9")
    assert done.returncode != 0
    assert "scalar" in done.stderr, "the message lists what there is"


def test_a_checkpoint_is_quantised_into_the_cache_once(
    environment: dict[str, str], nano_checkpoint: Path, answer: str
) -> None:
    args = (nano_checkpoint, "-p", QUESTION, "-n", "64", "--temp", "0")
    done = chat(environment, *args)
    assert done.stdout == answer, done.stderr
    assert "quantising it once" in done.stderr
    again = chat(environment, *args)
    assert again.stdout == answer
    assert "quantising" not in again.stderr


@pytest.mark.parametrize(
    ("args", "stdin", "code", "message"),
    [
        (["BUNDLE", "-p", ""], None, 3, "the prompt is empty"),
        (["BUNDLE"], b" \n", 3, "the prompt is empty"),
        (["BUNDLE"], b"\xff", 3, "stdin: not UTF-8"),
        (["BUNDLE", "--prompt_file", "no-such-file"], None, 3, "no-such-file: cannot be read"),
        (["BUNDLE", "-p", "word " * 50, "--cache_lens", "16"], None, 3, "the cache holds 16"),
        (["BUNDLE", "-p", "x", "-f", "y"], None, 2, "either -p or --prompt_file"),
        (["BUNDLE", "-p", "x", "--raw", "-sys", "y"], None, 2, "--raw completes plain text"),
        (["BUNDLE", "-p", "x", "--top-p", "7"], None, 2, "top_p must be in"),
        (["BUNDLE", "-p", "x", "--device", "tpu"], None, 2, "unknown device 'tpu'"),
        (["BUNDLE", "-p", "x", "--experts", "99"], None, 2, "num_experts must be in"),
        (["no-such-model", "-p", "x"], None, 3, "no such file or directory"),
        (["no-such/model", "-p", "x"], None, 7, "HF_HUB_OFFLINE is set"),
    ],
)
def test_refusals(
    environment: dict[str, str],
    nano_bundle: Path,
    args: list[str],
    stdin: bytes | None,
    code: int,
    message: str,
) -> None:
    given = [str(nano_bundle) if arg == "BUNDLE" else arg for arg in args]
    done = chat(environment, *given, stdin=stdin)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_bundle_without_a_manifest(environment: dict[str, str], nano_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(nano_bundle, broken)
    (broken / "bundle.json").write_text("{}")
    done = chat(environment, broken, "-p", "x")
    assert done.returncode == 3
    assert "bundle.json" in done.stderr


class Session:
    """A chat in a pseudo-terminal; both streams of the program arrive together, as a user sees them."""

    def __init__(self, environment: dict[str, str], *args: str | Path) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            command = [sys.executable, "-m", "kttools", "chat", *map(str, args)]
            os.execvpe(sys.executable, command, environment)
        self.seen = ""

    def until(self, pattern: str) -> str:
        """Reads until the pattern appears after what was read before; returns the text up to its end."""
        deadline = time.monotonic() + DEADLINE_S
        while (match := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen!r}"
            if not self._read(1.0):
                pytest.fail(f"ended before {pattern!r}: {self.seen!r}")
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def press_ctrl_c(self) -> None:
        """At a person's speed: CPython's readline misses a signal in the moment after it shows a prompt."""
        time.sleep(0.5)
        self.type("\x03")

    def exit_status(self) -> int:
        """Waits for the end and returns the exit status."""
        deadline = time.monotonic() + DEADLINE_S
        while self._read(1.0):
            assert time.monotonic() < deadline, f"still running: {self.seen!r}"
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        """Ends the program if a failed test left it running."""
        os.close(self._terminal)
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._terminal], [], [], seconds)
        if not ready:
            return True
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # the program closed its side
            return False
        self.seen += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)


@pytest.fixture
def interactive(environment: dict[str, str], nano_bundle: Path) -> Iterator[Session]:
    session = Session(environment, nano_bundle, "--temp", "0", "-n", "48")
    session.until(r"/help lists the commands.*\n> ")
    yield session
    session.close()


def test_a_session(interactive: Session, answer: str, environment: dict[str, str], tmp_path: Path) -> None:
    interactive.type(QUESTION + "\n")
    shown = interactive.until(r"tok/s; load .*\n> ")
    assert answer.strip()[:40] in shown
    interactive.type("Who \\\nare you?\n")
    assert " from cache)" in interactive.until(r"tok/s; load .*\n> ")
    interactive.type("/regen\n")
    interactive.until(r"tok/s; load .*\n> ")
    interactive.type(f"/save {tmp_path / 'saved.json'}\n")
    interactive.until(r"saved to .*\n> ")
    messages = json.loads((tmp_path / "saved.json").read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "Who \nare you?"
    interactive.type("/nothing\n")
    interactive.until(r"unknown command /nothing")
    interactive.type("/exit\n")
    assert interactive.exit_status() == 0
    history = Path(environment["XDG_CACHE_HOME"]) / "kttools" / "chat_history"
    assert QUESTION in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_end_of_input_leaves(interactive: Session) -> None:
    interactive.type("\x04")
    assert interactive.exit_status() == 0


def test_ctrl_c_at_the_prompt(interactive: Session) -> None:
    interactive.type("half a line")
    interactive.press_ctrl_c()
    interactive.until(r"Ctrl-C again or /exit")
    interactive.until(r"> ")
    interactive.type("/stats\n")
    interactive.until(r"cache: 0 of \d+ tokens.*\n> ")
    interactive.press_ctrl_c()
    interactive.until(r"Ctrl-C again.*\n> ")
    interactive.press_ctrl_c()
    assert interactive.exit_status() == 130


def test_ctrl_c_stops_an_answer_and_keeps_the_session(environment: dict[str, str], nano_bundle: Path) -> None:
    """Scalar kernels and a high temperature make an answer that is long and slow enough to be stopped."""
    slow = ("--temp", "5", "--seed", "1", "--isa", "scalar", "--cpu_infer", "1")
    session = Session(environment, nano_bundle, *slow)
    try:
        session.until(r"/help lists the commands.*\n> ")
        session.type("Tell me a very long story.\n")
        session.until(r"long story\.\n.{20}")
        session.press_ctrl_c()
        session.until(r"stopped; Ctrl-C again to leave\)\n> ")
        session.type("/stats\n")
        session.until(r"; 2 messages\n> ")
        session.type("Go on.\n")
        session.until(r"Go on\.\n.{20}")
        session.press_ctrl_c()
        session.until(r"stopped.*\n> ")
        session.press_ctrl_c()
        assert session.exit_status() == 130
    finally:
        session.close()


def test_ctrl_c_in_a_one_shot_answer(environment: dict[str, str], nano_bundle: Path) -> None:
    command = [sys.executable, "-m", "kttools", "chat", str(nano_bundle), "-p", "A story.", "--temp", "5"]
    process = subprocess.Popen(
        [*command, "--isa", "scalar", "--cpu_infer", "1"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert b"Traceback" not in error


def test_a_reader_that_leaves_is_quiet(environment: dict[str, str], nano_bundle: Path) -> None:
    command = f"{sys.executable} -m kttools chat {nano_bundle} -p 'A story.' --temp 5 --quiet | head -c 20"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, timeout=DEADLINE_S)
    assert len(done.stdout) == 20
    assert done.stderr == b""
