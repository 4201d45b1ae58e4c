"""Mutation fuzzer for the file parsers.

python -m tests.fuzz.fuzz gguf --seconds 60       (from the repository's root; or another target, or --runs)

Every input must be read or refused with an InvalidInputError, within SLOW_SECONDS and without taking memory
that the file does not justify. Anything else is a finding: it is printed, kept in --save, and the exit status
is 1. Files in tests/fuzz/corpus/<target>/ are tried first: put every finding there when it is mended. An
input that is refused with words not met before joins the seeds, so that what lies behind a check is reached;
--grow writes the small ones of these into a folder, which is how the corpus was made.
"""

import argparse
import hashlib
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kttools_runtime.errors import InvalidInputError
from tests.fuzz import dictionary
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS, Target
from tests.memory import resident_bytes

CORPUS = Path(__file__).resolve().parent / "corpus"
SLOW_SECONDS = 5.0
GROWTH_BYTES = 1 << 30
GROWN_BYTES = 8192
BATCH = 1000  # inputs


@dataclass
class Outcome:
    """accepted and refused: numbers of inputs; findings: (input, what went wrong).

    grown: an input for every refusal, by its words without names and numbers.
    """

    accepted: int = 0
    refused: int = 0
    findings: list[tuple[bytes, str]] = field(default_factory=list)
    grown: dict[str, bytes] = field(default_factory=dict)

    @property
    def runs(self) -> int:
        return self.accepted + self.refused + len(self.findings)


def fuzz(
    target: Target,
    folder: Path,
    seconds: float,
    seed: int,
    corpus: Path | None = None,
    runs: int | None = None,
    words: Sequence[bytes] = (),
) -> Outcome:
    """Runs for `seconds` or for `runs` inputs; the same seed tries the same ones in the same order."""
    rng = random.Random(seed)
    (folder / "seeds").mkdir()
    seeds = target.seeds(folder / "seeds")
    kept = [file.read_bytes() for file in sorted(corpus.iterdir())] if corpus and corpus.is_dir() else []
    outcome = Outcome()
    end = time.monotonic() + seconds
    for data in [*kept, *dict.fromkeys(seeds)]:
        try_one(target, folder, data, outcome)
    pool = seeds + kept
    if runs and target.parse:
        while outcome.runs < runs:
            try_many(target.parse, [mutated(rng, pool, words) for _ in range(BATCH)], outcome)
    while outcome.runs < (runs or 0) if runs else time.monotonic() < end:
        known = len(outcome.grown)
        data = mutated(rng, pool, words)
        try_one(target, folder, data, outcome)
        if len(outcome.grown) > known:
            pool.append(data)
    return outcome


def try_many(parse: Callable[[bytes], None], batch: list[bytes], outcome: Outcome) -> None:
    """As try_one, but without files, and with time and memory of the batch as a whole."""
    before, started = resident_bytes(), time.thread_time()
    for data in batch:
        try_parse(lambda data=data: parse(data), data, outcome)
    if time.thread_time() - started > SLOW_SECONDS:
        outcome.findings.append(
            (batch[0], f"{BATCH} inputs from this one on took more than {SLOW_SECONDS} s")
        )
    if resident_bytes() - before > GROWTH_BYTES:
        outcome.findings.append((batch[0], f"memory grew in the {BATCH} inputs from this one on"))


def try_one(target: Target, folder: Path, data: bytes, outcome: Outcome) -> None:
    file = folder / f"input{target.suffix}"
    file.write_bytes(data)
    before, started = resident_bytes(), time.thread_time()
    try_parse(lambda: target.run(file), data, outcome)
    if time.thread_time() - started > SLOW_SECONDS:
        outcome.findings.append((data, f"took {time.thread_time() - started:.1f} s"))
    if resident_bytes() - before > GROWTH_BYTES:
        outcome.findings.append((data, f"memory grew by {resident_bytes() - before} bytes"))


def try_parse(attempt: Callable[[], None], data: bytes, outcome: Outcome) -> None:
    try:
        attempt()
        outcome.accepted += 1
    except InvalidInputError as error:
        outcome.refused += 1
        outcome.grown.setdefault(_words_of(str(error)), data)
        if "\n" in str(error):
            outcome.findings.append((data, f"a message of several lines: {error}"))
    except Exception:  # the point of the exercise
        outcome.findings.append((data, traceback.format_exc()))


def _words_of(message: str) -> str:
    """A message without paths, names in quotes and numbers."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\S*\d\S*", "#", message)[:120]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--runs", type=int, default=None, help="so many inputs instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=None, help="folder for findings")
    parser.add_argument("--grow", type=Path, default=None, help="folder for inputs that met new refusals")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[options.target]
        outcome = fuzz(
            target,
            Path(folder),
            options.seconds,
            options.seed,
            CORPUS / options.target,
            options.runs,
            dictionary.words(options.target),
        )
    print(
        f"{options.target}: {outcome.runs} inputs: {outcome.accepted} read, {outcome.refused} refused in "
        f"{len(outcome.grown)} ways"
    )
    if options.grow:
        grow(outcome, options.grow)
    for number, (data, problem) in enumerate(outcome.findings):
        print(f"finding {number}: {problem}")
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            (options.save / f"{options.target}-{number}").write_bytes(data)
    return 1 if outcome.findings else 0


def grow(outcome: Outcome, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for data in outcome.grown.values():
        if len(data) <= GROWN_BYTES:
            (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
