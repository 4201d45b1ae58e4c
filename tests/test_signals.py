"""SIGINT and SIGTERM at any time: the exit code says so, the terminal is as it was, nothing is broken.

SIGNAL_MOMENTS sets how many random moments of loading are tried with each signal (default 1).
"""

import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kttools.bundle.verify import verify_bundle

MOMENTS = int(os.environ.get("SIGNAL_MOMENTS", "1"))
DEADLINE_S = 120.0
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
SLOW = ("--temp", "5", "--seed", "1", "--isa", "scalar", "--cpu_infer", "1")
both = pytest.mark.parametrize("number", list(CODES), ids=lambda number: number.name)


class OnTerminal:
    """A command in the foreground of a pseudo-terminal whose settings are compared before and after."""

    def __init__(self, *args: str | Path, cache: Path) -> None:
        self.master, self._slave = pty.openpty()
        self._before = self._settings()
        names = ("KTTOOLS_", "HF_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kttools", *map(str, args)],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            env={**kept, "XDG_CACHE_HOME": str(cache), "TERM": "xterm", "HF_HUB_OFFLINE": "1"},
        )
        self.seen = ""

    def until(self, pattern: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen!r}"
            assert self.process.poll() is None, f"ended before {pattern!r}: {self.seen!r}"
            self._read()

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def status(self) -> int:
        """Exit status as a shell shows it, the terminal checked."""
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still running: {self.seen!r}"
            self._read()
        self._read()
        assert self._settings() == self._before, "the terminal is not as it was"
        assert "Traceback" not in self.seen
        code = self.process.returncode
        return 128 - code if code < 0 else code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self._slave)

    def _settings(self) -> list[Any]:
        return termios.tcgetattr(self._slave)

    def _read(self) -> None:
        if select.select([self.master], [], [], 0.05)[0]:
            self.seen += os.read(self.master, 65536).decode("utf-8", "replace")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def chat(nano_bundle: Path, cache: Path) -> Iterator[OnTerminal]:
    """At its prompt."""
    terminal = OnTerminal("chat", nano_bundle, *SLOW, cache=cache)
    terminal.until(r"/help lists the commands")
    time.sleep(0.5)  # CPython's readline misses a signal in the moment after it shows a prompt
    yield terminal
    terminal.close()


@both
def test_at_the_prompt(chat: OnTerminal, number: signal.Signals) -> None:
    chat.send(number)
    if number == signal.SIGINT:  # the first one only warns
        chat.until("Ctrl-C again")
        time.sleep(0.5)
        chat.send(number)
    assert chat.status() == CODES[number]


@both
def test_while_it_decodes(chat: OnTerminal, number: signal.Signals) -> None:
    chat.type("Tell me a very long story.\n")
    chat.until(r"long story\.\r\n.{20}")
    chat.send(number)
    if number == signal.SIGINT:
        chat.until(r"stopped; Ctrl-C again")
        time.sleep(0.5)
        chat.send(number)
    assert chat.status() == CODES[number]


def test_a_termination_that_is_swallowed_comes_again_and_tidying_up_is_not_disturbed() -> None:
    code = """
import os, signal, time
from kttools import cli
with cli._signals_caught():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)
    except BaseException:
        print("swallowed")
    try:
        time.sleep(60)
    finally:
        time.sleep(2.5)
        print("tidy")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.stdout.split() == ["swallowed", "tidy"]
    assert done.stderr.strip().endswith("Terminated")


@both
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 1.0])
def test_one_signal_is_enough_while_libraries_load_and_it_prefills(
    nano_bundle: Path, cache: Path, tmp_path: Path, number: signal.Signals, delay_s: float
) -> None:
    """From the first thread of a library on, whose import an exception would leave in halves."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("word " * 2000)
    terminal = OnTerminal("chat", nano_bundle, "-f", prompt, "--chunk_size", "8", *SLOW, cache=cache)
    try:
        task = Path(f"/proc/{terminal.process.pid}/task")
        while len(list(task.iterdir())) < 2 and terminal.process.poll() is None:
            time.sleep(0.002)
        time.sleep(delay_s)
        terminal.send(number)
        assert terminal.status() == CODES[number], terminal.seen
    finally:
        terminal.close()


@both
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_while_it_starts_and_loads(
    nano_bundle: Path, cache: Path, number: signal.Signals, moment: int
) -> None:
    """From the first line of the program on; before that it is Python's own start."""
    terminal = OnTerminal("chat", nano_bundle, *SLOW, cache=cache)
    try:
        maps = Path(f"/proc/{terminal.process.pid}/maps")
        while "_queue" not in maps.read_text() and "libtorch" not in maps.read_text():
            time.sleep(0.005)
        time.sleep(random.Random(moment).uniform(0, 1.0))
        terminal.send(number)
        if number == signal.SIGINT:  # it may have come to its prompt by now
            time.sleep(1.0)
            if terminal.process.poll() is None:
                terminal.send(number)
        assert terminal.status() == CODES[number]
    finally:
        terminal.close()


@both
def test_while_it_quantises(
    nano_checkpoint: Path, nano_bundle: Path, cache: Path, tmp_path: Path, number: signal.Signals
) -> None:
    bundle = tmp_path / "b"
    terminal = OnTerminal("quantize", nano_checkpoint, "-o", bundle, cache=cache)
    try:
        while not list(bundle.glob("experts/*.ktpack")) and terminal.process.poll() is None:
            time.sleep(0.001)
        terminal.send(number)
        assert terminal.status() in (CODES[number], 0)
    finally:
        terminal.close()
    assert list(bundle.rglob("*.part")) == []
    again = [sys.executable, "-m", "kttools", "quantize", str(nano_checkpoint), "-o", str(bundle), "--quiet"]
    if not (bundle / "bundle.json").exists():
        subprocess.run(again, check=True, stdout=subprocess.DEVNULL)
    assert verify_bundle(bundle).problems == []
    assert (bundle / "bundle.json").read_bytes() == (nano_bundle / "bundle.json").read_bytes()
