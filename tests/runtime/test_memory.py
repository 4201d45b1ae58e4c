"""RAM that is free, in containers of both cgroup versions, from a tree of our own."""

from pathlib import Path

import pytest

from kttools_runtime import memory

MIB = 1 << 20


def tree(root: Path, files: dict[str, str]) -> Path:
    text = {"proc/meminfo": "MemTotal: 4096000 kB\nMemAvailable:  2048000 kB\n", **files}
    for name, content in text.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def v2(folder: str, limit: str, used: int, cache: int) -> dict[str, str]:
    stat = f"anon 5\nfile {cache + 7}\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}\n"
    base = f"sys/fs/cgroup{folder}"
    return {f"{base}/memory.max": limit, f"{base}/memory.current": str(used), f"{base}/memory.stat": stat}


def test_without_a_limit_what_the_kernel_says(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/self/cgroup": "0::/user\n", **v2("/user", "max\n", 5, 4)})
    assert memory.available_bytes(root) == 2048000 * 1024
    assert memory.limit_bytes(root) is None


def test_a_container_leaves_its_limit_less_what_it_uses(tmp_path: Path) -> None:
    """Page cache counts as free: the kernel gives it back."""
    root = tree(tmp_path, {"proc/self/cgroup": "0::/\n", **v2("", f"{900 * MIB}", 500 * MIB, 300 * MIB)})
    assert memory.available_bytes(root) == 700 * MIB
    assert memory.limit_bytes(root) == 900 * MIB


def test_a_group_above_may_be_tighter(tmp_path: Path) -> None:
    files = v2("/a", f"{100 * MIB}", 90 * MIB, 0) | v2("/a/b", f"{800 * MIB}", 10 * MIB, 0)
    root = tree(tmp_path, {"proc/self/cgroup": "0::/a/b\n", **files})
    assert memory.available_bytes(root) == 10 * MIB


def test_the_first_version_of_cgroups(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory/docker/x"
    files = {
        "proc/self/cgroup": "5:cpu:/docker/x\n4:memory:/docker/x\n",
        f"{base}/memory.limit_in_bytes": str(600 * MIB),
        f"{base}/memory.usage_in_bytes": str(500 * MIB),
        f"{base}/memory.stat": f"inactive_file 1\ntotal_inactive_file {40 * MIB}\ntotal_active_file {MIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }
    assert memory.available_bytes(tree(tmp_path, files)) == 141 * MIB


def test_more_used_than_allowed_is_nothing_left(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/self/cgroup": "0::/\n", **v2("", "1000", 4000, 0)})
    assert memory.available_bytes(root) == 0


@pytest.mark.parametrize("path", ["/../../etc", "/a/./b", "no colons at all"])
def test_a_strange_path_stays_below_the_root(path: str, tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/self/cgroup": f"0::{path}\n", **v2("", str(64 * MIB), 0, 0)})
    assert memory.available_bytes(root) == 64 * MIB


def test_this_process() -> None:
    assert memory.available_bytes() > 1 * MIB
    assert 1 * MIB < memory.resident_bytes() < 64 << 30
