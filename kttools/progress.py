"""Progress on stderr: a bar on a terminal, a line every few seconds otherwise, nothing when quiet."""

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 5.0


class ByteProgress:
    """Counts bytes from any thread; a context manager, so that a bar is always closed."""

    def __init__(self, title: str, is_quiet: bool) -> None:
        self.title = title
        self.is_quiet = is_quiet
        self.is_terminal = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._bar: tqdm | None = None
        self._done = self._total = 0
        self._next_line = time.monotonic() + LINE_SECONDS

    def start(self, total_bytes: int) -> None:
        self._total = total_bytes
        if self.is_terminal and not self.is_quiet:
            self._bar = tqdm(total=total_bytes, desc=self.title, unit="B", unit_scale=True, unit_divisor=1024)

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.update(count)
            elif not self.is_quiet and not self.is_terminal and time.monotonic() >= self._next_line:
                self._next_line = time.monotonic() + LINE_SECONDS
                percent = 100 * self._done // max(self._total, 1)
                sys.stderr.write(f"{self.title}: {percent} % of {self._total >> 20} MiB\n")

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class TokenProgress:
    """Counts tokens of one thread with tokens/s and the time left; a context manager as ByteProgress."""

    def __init__(self, title: str, is_quiet: bool) -> None:
        self.title = title
        self.is_quiet = is_quiet
        self.is_terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._done = self._total = 0
        self._started = self._next_line = time.monotonic()

    def start(self, total_tokens: int) -> None:
        self._total = total_tokens
        self._started = time.monotonic()
        self._next_line = self._started + LINE_SECONDS
        if self.is_terminal and not self.is_quiet:
            self._bar = tqdm(total=total_tokens, desc=self.title, unit="tok", unit_scale=True)

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self.is_quiet and not self.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            rate = self._done / max(time.monotonic() - self._started, 1e-9)
            left = tqdm.format_interval((self._total - self._done) / max(rate, 1e-9))
            percent = 100 * self._done // max(self._total, 1)
            line = f"{percent} % of {self._total} tokens, {rate:.0f} tokens/s, {left} left"
            sys.stderr.write(f"{self.title}: {line}\n")

    def __enter__(self) -> "TokenProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
