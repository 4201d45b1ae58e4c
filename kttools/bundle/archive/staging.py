"""Where unpack writes: a hidden folder beside the target, which becomes the target when all is verified.

Nothing in it is believed. A rerun reads what is there against the index's checksums; so there is no journal
that a power cut could make lie, and whoever dies at whatever moment leaves something to go on with.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from kttools.bundle.atomic import flush, translate_oserror
from kttools.bundle.lock import hold_directory
from kttools_runtime.errors import ResourceError, UsageError

# A run of zeros this long, aligned, becomes a hole: some blocks of every common file system.
HOLE_BYTES = 16 << 10
ZEROS = bytes(HOLE_BYTES)
# Bytes of one write. For a longer one the kernel takes large folios for the page cache, whose memory the
# virtual machine's host had to find first: 4.5 GB in 11.7 to 14.2 s with 1 MiB, 7.9 to 8.1 with 128 KiB, 7.2
# to 8.0 with 32 KiB, 9.2 to 10.0 with 4 KiB (two cores, ext4).
WRITE_BYTES = 64 << 10


class Staging:
    """The folder that is to become `target`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.root = target.with_name(f".{target.name}.unpack")

    def check_target(self) -> None:
        """Raises UsageError when something stands under the final name."""
        if self.target.is_symlink() or self.target.exists():
            is_empty = (
                self.target.is_dir() and not self.target.is_symlink() and not any(self.target.iterdir())
            )
            if not is_empty:
                raise UsageError(f"{self.target}: already there; choose another -o or remove it")

    @contextlib.contextmanager
    def held(self, names: Iterable[str]) -> Iterator[None]:
        """Makes the folder, locked, with nothing in it but files and folders of `names`.

        Raises KTError when another process has it, ResourceError when the disk is full.
        """
        if self.root.is_symlink():
            raise UsageError(f"{self.root}: a symbolic link where a folder of our own should be; remove it")
        with hold_directory(self.root):
            try:
                self._sweep(set(names))
            except OSError as error:
                raise translate_oserror(error, self.target) from error
            yield

    def allocated_bytes(self, names: Iterable[str]) -> int:
        """Disk space that files of an earlier run have; before held(), too."""
        total = 0
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(self.root / name).st_blocks * 512
        return total

    def check_space(self, needed: int) -> None:
        """Raises ResourceError when `needed` bytes are not free where the target will be."""
        folder = next(path for path in self.target.absolute().parents if path.is_dir())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ResourceError(
                f"{self.target}: needs {needed} bytes, {free} are free; free some space or choose another -o"
            )

    def write_small(self, name: str, data: bytes) -> None:
        """A file from memory."""
        file = StagedFile(self.root / name, len(data))
        try:
            file.write(0, data, with_holes=False)
        finally:
            file.close()

    def finish(self) -> None:
        """Flushes all files and folders and gives the whole its name."""
        try:
            for folder, _, files in os.walk(self.root):
                for name in files:
                    flush(Path(folder) / name)
                flush(Path(folder))
            os.rename(self.root, self.target)
            flush(self.target.parent)
        except OSError as error:
            raise translate_oserror(error, self.target) from error

    def _sweep(self, names: set[str]) -> None:
        """Removes everything else, and links and such whatever their names; makes the folders."""
        folders = {parent.as_posix() for name in names for parent in Path(name).parents} - {"."}
        for folder, below, files in os.walk(self.root, topdown=False):
            for entry in [*files, *below]:
                path = Path(folder) / entry
                name = path.relative_to(self.root).as_posix()
                mode = path.lstat().st_mode
                if stat.S_ISDIR(mode):
                    if name not in folders:
                        path.rmdir()
                elif not stat.S_ISREG(mode) or name not in names:
                    path.unlink()
        for name in sorted(folders):
            (self.root / name).mkdir(exist_ok=True)


class StagedFile:
    """One file being filled, in any order. is_resumed: an earlier run left something in it."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.bytes = count
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self.descriptor = os.open(path, flags, 0o666)
            self.is_resumed = os.fstat(self.descriptor).st_size > 0
            os.ftruncate(self.descriptor, count)
        except OSError as error:
            raise translate_oserror(error, path) from error

    def read(self, offset: int, count: int) -> bytes:
        """What is there; shorter, or empty, when it cannot be read: then it is written again."""
        try:
            return os.pread(self.descriptor, count, offset)
        except OSError:
            return b""

    def write(self, offset: int, data: bytes, with_holes: bool = True) -> None:
        """Writes all of it; in a new file, runs of zeros stay holes. Raises ResourceError, KTError."""
        view = memoryview(data)
        runs = filled_runs(data) if with_holes and not self.is_resumed else [(0, len(data))]
        try:
            for begin, end in runs:
                while begin < end:
                    piece = view[begin : min(end, begin + WRITE_BYTES)]
                    begin += os.pwrite(self.descriptor, piece, offset + begin)
        except OSError as error:
            raise translate_oserror(error, self.path) from error

    def close(self) -> None:
        """Safe to call again."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def filled_runs(data: bytes) -> list[tuple[int, int]]:
    """Begin and end of what is left of `data` without its aligned runs of HOLE_BYTES zeros."""
    runs: list[tuple[int, int]] = []
    for begin in range(0, len(data), HOLE_BYTES):
        end = min(begin + HOLE_BYTES, len(data))
        if data.startswith(ZEROS[: end - begin], begin):
            continue
        if runs and runs[-1][1] == begin:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((begin, end))
    return runs
