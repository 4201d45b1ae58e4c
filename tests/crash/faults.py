"""Faults in the process they are installed in: death or an error at the n-th call that changes a file system.

Counted are the calls of os (and io.open for writing) by which Python code makes, fills, flushes, names and
removes files. What libraries write by themselves is hit by kills at random times.
"""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

WRITES = ("write", "pwrite")
NAMES = ("replace", "rename", "link", "unlink", "mkdir", "rmdir", "fsync", "ftruncate")
MAKING = os.O_CREAT | os.O_WRONLY | os.O_RDWR
FULL = {"write", "pwrite", "open", "mkdir", "link", "fsync", "ftruncate"}
READ_ONLY = FULL | {"replace", "rename", "unlink", "rmdir"}
ERRNOS = {"full": (errno.ENOSPC, FULL), "read-only": (errno.EROFS, READ_ONLY)}


@dataclass(frozen=True, slots=True)
class Fault:
    """kind: "" (only count), "kill" (before the call), "torn" (half of a write, or after the call), "full" or
    "read-only" (from the call on, every one that needs space, or changes anything, fails). at: its number.
    """

    kind: str = ""
    at: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Injector:
    """Counts and strikes; install() cannot be undone, so it is for a process of its own."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.calls = 0

    def install(self) -> None:
        for name in (*WRITES, *NAMES):
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        os.open = self._opening(os.open)  # type: ignore[assignment]
        io.open = builtins.open = self._file_opening(io.open)  # type: ignore[assignment]

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._strike(name, original, args, kwargs)

        return call

    def _opening(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
            if not flags & MAKING or not _is_file_path(path):
                return original(path, flags, *args, **kwargs)
            return self._strike("open", original, (path, flags, *args), kwargs)

        return call

    def _file_opening(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+") or not _is_file_path(file):
                return original(file, mode, *args, **kwargs)
            return self._strike("open", original, (file, mode, *args), kwargs)

        return call

    def _strike(self, name: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.calls += 1
        kind, at = self.fault.kind, self.fault.at
        if kind in ERRNOS and self.calls >= at:
            number, names = ERRNOS[kind]
            if name in names:
                raise OSError(number, os.strerror(number))
        if self.calls == at and kind == "kill":
            die()
        if self.calls == at and kind == "torn":
            if name in WRITES:
                args = (args[0], memoryview(args[1]).cast("B")[: len(args[1]) // 2], *args[2:])
            original(*args, **kwargs)
            die()
        return original(*args, **kwargs)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _is_file_path(path: Any) -> bool:
    return isinstance(path, str | os.PathLike) and not str(path).startswith(("/proc", "/dev", "/sys"))
