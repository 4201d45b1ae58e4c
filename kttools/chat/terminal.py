"""The interactive terminal: reading lines, printing segments, and what Ctrl-C means when."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from kttools.dirs import cache_dir
from kttools_runtime.errors import KTError
from kttools_runtime.streaming import Segment

from .session import ChatSession

BLOCK = '"""'
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
HISTORY_LINES = 1000


class Printer:
    """Writes an answer as it comes. On a terminal thinking is dim and control characters are replaced."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._dims = self._is_terminal and not os.environ.get("NO_COLOR")
        if isinstance(getattr(stream, "reconfigure", None), Callable):  # type: ignore[arg-type]
            stream.reconfigure(errors="replace")  # type: ignore[attr-defined]

    def answer(self, segments: Iterable[Segment]) -> str:
        """Prints the segments and a final line break; returns the text."""
        parts: list[str] = []
        try:
            for segment in segments:
                parts.append(segment.text)
                self._write(segment)
        finally:
            if parts and not parts[-1].endswith("\n"):
                self._stream.write("\n")
            self._stream.flush()
        return "".join(parts)

    def _write(self, segment: Segment) -> None:
        text = CONTROL.sub("\ufffd", segment.text) if self._is_terminal else segment.text
        self._stream.write(f"{DIM}{text}{PLAIN}" if self._dims and segment.is_thinking else text)
        self._stream.flush()


class Interrupt:
    """Ctrl-C while an answer is made: the first asks it to stop, the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False

    def is_requested(self) -> bool:
        return self.requested

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Installs the handler for the length of one answer."""
        self.requested = False
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, _: int, __: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def readline_history(path: Path) -> Iterator[None]:
    """Line editing with a history file; without the readline module, plain input."""
    try:
        import readline
    except ImportError:
        yield
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            readline.write_history_file(path)
            path.chmod(0o600)


def read_message(read_line: Callable[[str], str]) -> str:
    """One message: a line, lines joined by a trailing backslash, or a block between two triple quotes.

    Raises EOFError at the end of input.
    """
    line = read_line("> ")
    if line.lstrip().startswith(BLOCK):
        return _read_block(line.lstrip()[len(BLOCK) :], read_line)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read_line(". "))
    return "\n".join(lines)


def _read_block(first: str, read_line: Callable[[str], str]) -> str:
    lines = [first]
    while not lines[-1].rstrip().endswith(BLOCK):
        lines.append(read_line(". "))
    lines[-1] = lines[-1].rstrip()[: -len(BLOCK)]
    return "\n".join(lines).strip("\n")


class Terminal:
    """The interactive loop over a session.

    commands: what a line that starts with / does, slash.run(); say: writes a line for the user (stderr).
    """

    def __init__(
        self,
        session: ChatSession,
        commands: Callable[["Terminal", str], bool],
        say: Callable[[str], None],
        load_s: float,
        read_line: Callable[[str], str] = input,
    ) -> None:
        self.session, self.say, self.load_s = session, say, load_s
        self.attachment = ""  # text of /read, put before the next message
        self._commands, self._read_line = commands, read_line
        self._interrupt = Interrupt()
        self._printer = Printer(sys.stdout)

    def run(self) -> None:
        """Until /exit or end of input. A second Ctrl-C in a row raises KeyboardInterrupt."""
        with readline_history(cache_dir() / "chat_history"):
            was_interrupted = False
            while True:
                try:
                    message = read_message(self._read_line)
                except EOFError:
                    self.say("")
                    return
                except KeyboardInterrupt:
                    if was_interrupted:
                        raise
                    was_interrupted = True
                    self.say("\n(Ctrl-C again or /exit to leave)")
                    continue
                if not self._handle(message):
                    return
                was_interrupted = self._interrupt.requested

    def _handle(self, message: str) -> bool:
        """False when the user leaves. Errors are shown, and the session goes on."""
        self._interrupt.requested = False
        try:
            if message.startswith("/"):
                return self._commands(self, message)
            if message.strip() or self.attachment:
                text, self.attachment = self.attachment + message, ""
                self.show(lambda: self.session.ask(text, self._interrupt.is_requested))
        except KTError as error:
            self.say(f"error: {error}")
        return True

    def regenerate(self) -> None:
        """Another answer to the last question."""
        self.show(lambda: self.session.regenerate(self._interrupt.is_requested))

    def show(self, start: Callable[[], Iterator[Segment]]) -> None:
        """Prints an answer as it is made, then its speed."""
        with self._interrupt.caught():
            self._printer.answer(start())
        stats = self.session.stats
        if stats is not None:
            note = NOTES.get(stats.finish_reason, "")
            self.say(f"[{stats.line(self.load_s)}]{note}")


NOTES = {
    "interrupted": " (stopped; Ctrl-C again to leave)",
    "length": " (cut at the token limit: /set n)",
    "cache_full": " (the cache is full: /clear, or start with a larger --cache_lens)",
}
