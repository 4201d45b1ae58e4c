"""kt-kernel (KTransformers) as a peer: our side of the pipe to kt_worker.py.

It runs in its own interpreter, so that it may live in another environment, and computes only when asked.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from kttools_runtime.errors import EngineError, UsageError

from .shapes import LayerShape

WORKER = Path(__file__).with_name("kt_worker.py")
FORMATS = ("int8", "int4", "bf16")
NAME = "kt-kernel"

# kt-kernel's idle workers ask for the time in a tight loop for 50 ms, and the thread that called them spins
# too: with as many workers as cores one of them always stands in the way. Every 64th look at the clock naps.
IDLE_SHIM = """\
#include <chrono>
#include <time.h>
static timespec look(clockid_t clock) {
  static thread_local unsigned looks = 0;
  if (++looks % 64 == 0) {
    const timespec nap = {0, 20000};
    nanosleep(&nap, nullptr);
  }
  timespec now;
  clock_gettime(clock, &now);
  return now;
}
template <typename Duration>
static Duration since_epoch(const timespec& t) {
  const auto exact = std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
  return std::chrono::duration_cast<Duration>(exact);
}
std::chrono::system_clock::time_point std::chrono::system_clock::now() noexcept {
  return time_point(since_epoch<duration>(look(CLOCK_REALTIME)));
}
std::chrono::steady_clock::time_point std::chrono::steady_clock::now() noexcept {
  return time_point(since_epoch<duration>(look(CLOCK_MONOTONIC)));
}
"""


def available(python: str | None) -> bool:
    """Whether that interpreter (None: this one) has kt_kernel."""
    if python is None:
        return importlib.util.find_spec("kt_kernel") is not None
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('kt_kernel') is None)"
    try:
        return subprocess.run([python, "-c", probe], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class KtKernelPeer:
    """A kt-kernel process; a context manager. Raises UsageError without kt_kernel, EngineError if it dies."""

    def __init__(self, python: str | None = None) -> None:
        if not available(python):
            where = python or "this environment"
            raise UsageError(
                f"kt_kernel is not installed in {where}: give --peer-python the interpreter that has it"
            )
        self._files = tempfile.TemporaryDirectory(prefix="kttools-bench-")
        shim = _build_shim(Path(self._files.name))
        environment = {**os.environ, **({"LD_PRELOAD": str(shim)} if shim else {})}
        self._process = subprocess.Popen(
            [python or sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        self.is_tamed = shim is not None
        self.isa = ""
        self.expert_bytes = 0
        self.huge_page_share: float | None = None
        self.name = NAME
        self.version = str(self._ask(op="hello")["version"])

    def load(
        self,
        shape: LayerShape,
        format: str,
        threads: int,
        max_tokens: int,
        weights: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        """Make a layer. weights: gate, up [E, I, H], down [E, H, I] in bf16; None: a few random experts."""
        if format not in FORMATS:
            raise UsageError(f"{NAME} is measured with {', '.join(FORMATS)}, got {format!r}")
        files = []
        for name, tensor in zip(("gate", "up", "down"), weights or (), strict=False):
            files.append(self._write(name, tensor.view(torch.uint16)))
        sizes = {name: getattr(shape, name) for name in LayerShape.__dataclass_fields__ if name != "name"}
        reply = self._ask(
            op="load", format=format, threads=threads, max_tokens=max_tokens, files=files, **sizes
        )
        for path in files:
            Path(path).unlink()
        self.isa, self.expert_bytes = reply["variant"], reply["expert_bytes"]

    def call(self, num_tokens: int) -> tuple[float, int]:
        """(seconds, experts hit) of one call with fresh ids, behind an untimed one of one token."""
        reply = self._ask(op="call", num_tokens=num_tokens)
        return reply["seconds"], reply["experts_hit"]

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H] bf16, ids int64 and weights f32 [T, k] -> [T, H] float32."""
        files = {"x": self._write("x", x.view(torch.uint16)), "ids": self._write("ids", ids)}
        files |= {"weights": self._write("weights", weights), "out": str(Path(self._files.name) / "out")}
        self._ask(op="forward", num_tokens=x.shape[0], **files)
        out = torch.frombuffer(bytearray(Path(files["out"]).read_bytes()), dtype=torch.bfloat16)
        return out.view(x.shape).float()

    def close(self) -> None:
        """End the process and remove its files; safe to call again."""
        if self._process.poll() is None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._files.cleanup()

    def __enter__(self) -> "KtKernelPeer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, name: str, tensor: torch.Tensor) -> str:
        path = Path(self._files.name) / name
        tensor.contiguous().numpy().tofile(path)
        return str(path)

    def _ask(self, **request: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except (BrokenPipeError, ValueError):  # ValueError: closed on our side
            line = ""
        if not line:
            raise EngineError(f"{NAME} died at {request['op']} (exit status {self._process.wait()})")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineError(f"{NAME} failed at {request['op']}: {reply['error']}")
        return reply


def _build_shim(folder: Path) -> Path | None:
    """The compiled IDLE_SHIM, or None without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return None
    source, library = folder / "idle_shim.cpp", folder / "idle_shim.so"
    source.write_text(IDLE_SHIM, encoding="utf-8")
    command = [compiler, "-O2", "-fPIC", "-shared", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True)
    return library if done.returncode == 0 else None
