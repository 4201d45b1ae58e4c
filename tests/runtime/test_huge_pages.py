"""Huge pages of files: asked for where they pay, and counted as Linux reports them."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from kttools_runtime.huge_pages import (
    HUGE_PAGE,
    LEAST_FILE_BYTES,
    ask_for_huge_pages,
    in_huge_pages,
)
from tests.memory import mapped

SMAPS = """7f0000000000-7f0000400000 r--s 00000000 fe:00 12    /models/layer-00001.ktpack
Size:               4096 kB
Rss:                3072 kB
FilePmdMapped:      2048 kB
7f0000400000-7f0000500000 r--p 00000000 fe:00 13    /lib/libc.so.6
Rss:                1024 kB
FilePmdMapped:         0 kB
7f0000500000-7f0000600000 r--s 00000000 fe:00 14    /models/layer-00002.ktpack
Rss:                 100 kB
FilePmdMapped:         0 kB
"""


def test_counts_the_files_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "smaps").write_text(SMAPS)
    packs, library = mapped(7, ".ktpack", tmp_path), mapped(7, ".so.6", tmp_path)
    assert (packs["Rss"], packs["FilePmdMapped"]) == (3172 << 10, 2048 << 10)
    assert (library["Rss"], library["FilePmdMapped"]) == (1024 << 10, 0)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or sys.platform != "linux",
    reason="no transparent huge pages",
)
@pytest.mark.parametrize(("size", "is_asked"), [(LEAST_FILE_BYTES, True), (LEAST_FILE_BYTES - 4096, False)])
def test_asks_for_large_files_only(tmp_path: Path, size: int, is_asked: bool) -> None:
    path = tmp_path / f"{size}.ktpack"
    with path.open("w+b") as file:
        file.truncate(size)  # a hole
        mapping = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        ask_for_huge_pages(mapping)
        assert ("hg" in flags_of(path.name)) == is_asked
        assert mapping[size - 1] == 0


@pytest.mark.parametrize("rows", [4, 4096])
def test_a_copy_is_the_same_numbers(rows: int) -> None:
    whole = torch.randn(rows, 1024, 2).to(torch.bfloat16)
    copy = in_huge_pages(whole[..., 1])
    assert copy.is_contiguous()
    assert torch.equal(copy, whole[..., 1])
    assert (copy.data_ptr() % HUGE_PAGE == 0) or rows == 4


def flags_of(name: str) -> list[str]:
    """Linux's flags of this process's mapping of a file."""
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_ours = line.endswith(name)
        elif is_ours and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{name} is not mapped")
