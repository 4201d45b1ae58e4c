"""Checks a bundle against its manifest: every byte of every listed file, and that headers say the same.

All problems are collected before anything is raised, so that one run shows the whole damage. What the headers
say is checked in header_checks.py, a signature in signing.py, and repair.py mends what is broken here.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.manifest import FileEntry, Manifest, presence_problem, read_manifest

from .hashing import OnBytes, hash_file
from .header_checks import header_problems
from .manifest import collect_files

MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class Verification:
    """Outcome of verify. problems: one line each, empty when the bundle is sound; extra: unlisted files.

    hash: which one of every file was compared, None when only sizes and headers were looked at. broken: the
    listed files that are not what the manifest says, which is what a repair replaces. repaired: files that
    it did; signer: who signed the manifest, when that was asked.
    """

    bundle: Path
    files: int
    bytes: int
    hash: str | None
    problems: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    signer: str | None = None

    @property
    def is_quick(self) -> bool:
        return self.hash is None

    def raise_on_problems(self) -> None:
        """Raises CorruptFileError with the first problem and the number of all."""
        if self.problems:
            count = len(self.problems)
            more = f" (first of {count} problems)" if count > 1 else ""
            raise CorruptFileError(f"{self.bundle}: {self.problems[0]}{more}")


def verify_bundle(
    bundle_dir: str | Path,
    *,
    is_quick: bool = False,
    hash: str = "xxh3_128",
    threads: int | None = None,
    on_start: OnBytes | None = None,
    on_bytes: OnBytes | None = None,
) -> Verification:
    """Verifies a bundle; is_quick: manifest, sizes and headers only.

    hash: xxh3_128 finds every accident; sha256 also what somebody forged, provided that the manifest is the
    right one (see signing.py). threads: files read at a time; None: one per CPU, at most MAX_THREADS.
    on_start: called once with the number of bytes to read; on_bytes: with each piece, from several threads.
    Raises InvalidInputError when there is no bundle and CorruptFileError when the manifest itself is damaged.
    """
    manifest = read_manifest(bundle_dir)
    used = None if is_quick else hash
    found = file_problems(manifest, used, threads or _threads(), on_start, on_bytes)
    problems = [f"{path}: {problem}" for path, problem in found.items()]
    problems += header_problems(manifest, manifest.files.keys() - found.keys())
    extra = [path for path in collect_files(manifest.root) if path not in manifest.files]
    total = sum(entry.bytes for entry in manifest.files.values())
    return Verification(manifest.root, len(manifest.files), total, used, problems, extra, list(found))


def file_problems(
    manifest: Manifest,
    hash: str | None,
    threads: int,
    on_start: OnBytes | None = None,
    on_bytes: OnBytes | None = None,
) -> dict[str, str]:
    """Path -> what is wrong with the file, in the order of paths; with a hash, every byte is read."""
    entries = list(manifest.files.values())
    found = {entry.path: presence_problem(manifest.root, entry) for entry in entries}
    if hash:
        readable = [entry for entry in entries if found[entry.path] is None]
        if on_start:
            on_start(sum(entry.bytes for entry in readable))
        check = _content_check(manifest.root, hash, on_bytes)
        # Largest first, so that no thread is left alone with a large file at the end.
        readable.sort(key=lambda entry: -entry.bytes)
        with ThreadPoolExecutor(threads, "verify") as pool:
            found |= dict(zip((entry.path for entry in readable), pool.map(check, readable), strict=True))
    return {path: problem for path, problem in sorted(found.items()) if problem}


def _threads() -> int:
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def _content_check(root: Path, hash: str, on_bytes: OnBytes | None) -> Callable[[FileEntry], str | None]:
    def check(entry: FileEntry) -> str | None:
        try:
            got = hash_file(root / entry.path, hash, on_bytes)
        except InvalidInputError as error:
            return str(error)
        expected = getattr(entry, hash)
        return None if got == expected else f"content changed: expected {hash} {expected}, got {got}"

    return check
