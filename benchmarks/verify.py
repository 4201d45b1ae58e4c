"""How fast `kttools verify` reads, beside the programs people use to check downloads.

python benchmarks/verify.py --gigabytes 4 --rounds 5 [--folder DIR] [--json]

Makes a directory of large files of random bytes, then measures in turn, round by round: verify's hash
(XXH3-128), verify --sha256, and whichever of sha256sum, b3sum and xxh128sum are installed; from the page
cache, or from disk where the files are larger than that. Prints GB/s, and how many times as fast verify is.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kttools.bundle.hashing import digest_file
from kttools.bundle.verify import file_problems
from kttools_runtime.manifest import FileEntry

FILE_BYTES = 512 << 20
PEERS = ("sha256sum", "b3sum", "xxh128sum")


def make_files(folder: Path, total: int) -> dict[str, FileEntry]:
    """Files of random bytes and their entries, as a manifest has them."""
    entries = {}
    for number in range(max(2, -(-total // FILE_BYTES))):
        path = folder / f"layer-{number:05d}.ktpack"
        with path.open("wb") as file:
            for _ in range(FILE_BYTES >> 24):
                file.write(os.urandom(1 << 24))
        digest = digest_file(path)
        entries[path.name] = FileEntry(path.name, digest.bytes, digest.xxh3_128, digest.sha256)
    return entries


class Listing:
    """As much of a manifest as file_problems() looks at."""

    def __init__(self, root: Path, files: dict[str, FileEntry]) -> None:
        self.root, self.files = root, files


def contestants(folder: Path, files: dict[str, FileEntry], threads: int) -> dict[str, Callable[[], None]]:
    listing = Listing(folder, files)

    def ours(kind: str, count: int) -> Callable[[], None]:
        def run() -> None:
            assert not file_problems(listing, kind, count)  # type: ignore[arg-type]

        return run

    def peer(program: str) -> Callable[[], None]:
        command = [program, *(str(folder / name) for name in files)]
        return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL) and None

    found = {
        f"verify, {threads} threads": ours("xxh3_128", threads),
        "verify, 1 thread": ours("xxh3_128", 1),
        f"verify --sha256, {threads} threads": ours("sha256", threads),
        "verify --sha256, 1 thread": ours("sha256", 1),
    }
    return found | {name: peer(name) for name in PEERS if shutil.which(name)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=None, help="where the files are made")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        files = make_files(folder, int(options.gigabytes * 1e9))
        total = sum(entry.bytes for entry in files.values())
        runs = contestants(folder, files, options.threads)
        seconds: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(options.rounds):
            for label, run in runs.items():
                started = time.perf_counter()
                run()
                seconds[label].append(time.perf_counter() - started)
    speeds = {label: total / statistics.median(times) / 1e9 for label, times in seconds.items()}
    first = next(iter(speeds.values()))
    rows = [{"what": k, "gb_per_s": round(v, 2), "verify_is": round(first / v, 2)} for k, v in speeds.items()]
    if options.json:
        print(json.dumps({"bytes": total, "rounds": options.rounds, "rows": rows}, indent=1))
    else:
        print(f"{total / 1e9:.1f} GB in {len(files)} files, median of {options.rounds} rounds, in turn")
        for row in rows:
            print(f"{row['what']:<32}{row['gb_per_s']:>7.2f} GB/s   verify is {row['verify_is']:.2f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
