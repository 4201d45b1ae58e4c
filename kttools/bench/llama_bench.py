"""llama.cpp as a peer: its own llama-bench, one test per run, so that its runs can alternate with ours."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kttools_runtime.errors import EngineError, UsageError

TIMEOUT_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class LlamaBench:
    """binary: llama-bench; model: a GGUF file; more: further arguments. UsageError when a file is missing."""

    binary: Path
    model: Path
    more: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for path, option in ((self.binary, "--llama-bench"), (self.model, "--gguf")):
            if not path.is_file():
                raise UsageError(f"{option} {path}: no such file")

    def measure(self, n_prompt: int, n_gen: int, threads: int, repeat: int) -> dict[str, Any]:
        """llama-bench's own record of one test (pp or tg), warmed up by it. Raises EngineError."""
        test = ["-p", str(n_prompt), "-n", str(n_gen), "-t", str(threads), "-r", str(repeat)]
        command = [str(self.binary), "-m", str(self.model), *test, "-o", "json", *self.more]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(f"llama-bench on {self.model.name}: {error}") from None
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise EngineError(f"llama-bench on {self.model.name} ended with {done.returncode}: {last}")
        return record_of(done.stdout)


def record_of(text: str) -> dict[str, Any]:
    """The one record of llama-bench -o json. Raises EngineError for anything else."""
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise EngineError(f"llama-bench did not print JSON: {error}") from None
    if not isinstance(records, list) or len(records) != 1 or "avg_ts" not in records[0]:
        raise EngineError("llama-bench printed something else than the record of one test")
    record: dict[str, Any] = records[0]
    return record
