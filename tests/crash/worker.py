"""A warmed interpreter that forks a child for every job, so that hundreds of deaths take no imports.

    python -m tests.crash.worker        jobs as JSON lines on stdin, outcomes as JSON lines on stdout

It starts no thread. A job names a scenario, its folder, and a fault; `kill_after_s` kills from outside.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kttools_runtime.errors import KTError

from .faults import Fault, Injector
from .scenarios import SCENARIOS

OTHER_ERROR = 99
DEADLINE_S = 300.0


def serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        sys.stdout.write(json.dumps(run(job)) + "\n")
        sys.stdout.flush()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Forks `count` children at the same work and waits for them."""
    started = time.monotonic()
    children = [start(job) for _ in range(job.get("count", 1))]
    outcomes = [wait(pid, pipe, job.get("kill_after_s"), started) for pid, pipe in children]
    return {"children": outcomes, "seconds": time.monotonic() - started}


def start(job: dict[str, Any]) -> tuple[int, int]:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return pid, read_end
    status = OTHER_ERROR
    try:
        report = child(job)
        status = report["status"]
        os.write(write_end, json.dumps(report).encode())
    finally:
        os._exit(status)


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Runs the scenario under the fault; the number of calls that a fault could strike."""
    scenario = SCENARIOS[job["scenario"]]
    real_write = os.write
    injector = Injector(Fault(**job["fault"]))
    injector.install()
    report: dict[str, Any] = {"status": 0, "message": "", "redone": None}
    try:
        report["redone"] = scenario.run(Path(job["folder"]))
    except KTError as error:
        report |= {"status": error.exit_code, "message": str(error)}
    except BaseException as error:
        report |= {"status": OTHER_ERROR, "message": f"{type(error).__name__}: {error}"}
    os.write = real_write  # the report is no part of the work
    return report | {"calls": injector.calls}


def wait(pid: int, pipe: int, kill_after_s: float | None, started: float) -> dict[str, Any]:
    limit = DEADLINE_S if kill_after_s is None else kill_after_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > limit:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005)
    with open(pipe, "rb") as stream:
        data = stream.read()
    report: dict[str, Any] = json.loads(data) if data else {}
    return report | {"exit": os.waitstatus_to_exitcode(status)}


class Worker:
    """The parent's side: a started worker. A context manager."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.worker"],
            cwd=Path(__file__).resolve().parents[2],
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(
        self,
        scenario: str,
        folder: Path,
        fault: Fault = Fault(),  # noqa: B008
        kill_after_s: float | None = None,
        count: int = 1,
    ) -> dict[str, Any]:
        """The outcome of a job: see run()."""
        job = {"scenario": scenario, "folder": str(folder), "fault": fault.to_dict(), "count": count}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job | {"kill_after_s": kill_after_s}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    serve()
