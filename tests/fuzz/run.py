"""All fuzzers, some at a time: `make fuzz`.

python -m tests.fuzz.run [--seconds 60] [--jobs 2] [--most 240] [--save DIR] [TARGET ...]

A target is an entry of TARGETS (targets.py). Each runs for --seconds, all together for at most --most: with
more targets than fit, each gets its share.
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.targets import TARGETS


def seconds_each(targets: int, seconds: float, jobs: int, most: float) -> float:
    """Of one target, so that rounds of `jobs` targets end in `most` seconds."""
    rounds = -(-targets // jobs)
    return min(seconds, most / max(rounds, 1))


def run_one(name: str, seconds: float, save: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.fuzz.fuzz", name, "--seconds", str(seconds), "--save", str(save)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="all by default")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--most", type=float, default=240.0)
    parser.add_argument("--save", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args()
    targets = options.targets or list(TARGETS)
    seconds = seconds_each(len(targets), options.seconds, options.jobs, options.most)
    started, status = time.monotonic(), 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for code, text in pool.map(lambda name: run_one(name, seconds, options.save), targets):
            print(text, end="", flush=True)
            status = status or code
    print(f"{len(targets)} targets, {seconds:.0f} s each, {time.monotonic() - started:.0f} s together")
    return status


if __name__ == "__main__":
    sys.exit(main())
