"""doctor: a machine made of files, and this one."""

import json
import os
import sys
from pathlib import Path

import pytest

from kttools import cli, doctor

CPU = "processor : {i}\nmodel name\t: Test CPU\nphysical id\t: {socket}\ncore id\t: {core}\n\n"
CPUINFO = "".join(CPU.format(i=i, socket=i // 2, core=i % 2) for i in range(4))
NODE = "Node {n} MemTotal:       1000 kB\nNode {n} MemFree:         400 kB\n"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Two NUMA nodes; the process may run on the first CPUs only. Everything else is well."""
    cpus = sorted(os.sched_getaffinity(0))
    files = {
        "proc/cpuinfo": CPUINFO,
        "proc/meminfo": "MemTotal: 2000 kB\nMemAvailable: 99 kB\nHugePages_Total: 3\nHugepagesize: 2048 kB\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "sys/devices/system/node/node0/cpulist": ",".join(map(str, cpus)),
        "sys/devices/system/node/node0/meminfo": NODE.format(n=0),
        "sys/fs/cgroup/cpu.max": "max 100000\n",
        "sys/fs/cgroup/memory.max": "max\n",
    }
    for name, text in files.items():
        write(tmp_path, name, text)
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def warnings(root: Path) -> str:
    return "\n".join(f"{w.what} -> {w.remedy}" for w in doctor.examine(root).warnings)


def test_facts_of_a_machine(machine: Path) -> None:
    sections = doctor.examine(machine).sections
    assert sections["cpu"]["model"] == "Test CPU"
    assert (sections["cpu"]["sockets"], sections["cpu"]["physical_cores"]) == (2, 4)
    assert sections["cpu"]["cgroup_cpus"] is None
    assert sections["memory"]["total_bytes"] == 2000 * 1024
    assert sections["memory"]["hugepages_total"] == 3
    assert sections["memory"]["hugepage_bytes"] == 2 << 20
    assert sections["memory"]["transparent_hugepages"] == "madvise"
    assert sections["memory"]["cgroup_limit_bytes"] is None
    assert sections["numa"]["nodes"][0]["total_bytes"] == 1000 * 1024
    assert "hugepages" not in warnings(machine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, "limits this process to 0.5 CPUs.*--cpu_infer 1"),
        ({"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]"}, "hugepages are off"),
        (
            {"sys/devices/system/node/node1/cpulist": "9999", "sys/devices/system/node/node1/meminfo": ""},
            "bound to NUMA node 0 of 2.*without numactl",
        ),
        (
            {"sys/devices/system/node/node1/cpulist": "9999", "proc/sys/kernel/numa_balancing": "1\n"},
            "NUMA balancing moves pages.*echo 0",
        ),
        ({"proc/meminfo": "MemAvailable: 9 kB\nSwapTotal: 9 kB\nSwapFree: 1 kB\n"}, "is swapping"),
    ],
)
def test_warnings_and_remedies(machine: Path, changes: dict[str, str], message: str) -> None:
    import re

    before = warnings(machine)
    for name, text in changes.items():
        write(machine, name, text)
    assert not re.search(message, before)
    assert re.search(message, warnings(machine))


def test_cgroup_limits_of_both_versions(tmp_path: Path) -> None:
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "150000")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "12345")
    assert doctor.cgroup_cpus(tmp_path) == 1.5
    assert doctor.cgroup_memory(tmp_path) == 12345
    write(tmp_path, "sys/fs/cgroup/cpu.max", "250000 100000")
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", str((1 << 63) - 4096))
    assert doctor.cgroup_cpus(tmp_path) == 2.5
    assert doctor.cgroup_memory(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8", [0, 1, 2, 3, 8]), ("5\n", [5]), ("", []), ("0-1,x", [0, 1])]
)
def test_cpu_lists(text: str, cpus: list[int]) -> None:
    assert doctor.cpu_list(text) == cpus


def test_an_empty_machine(tmp_path: Path) -> None:
    """Containers hide files; nothing of it may fail."""
    sections = doctor.examine(tmp_path).sections
    assert sections["memory"]["total_bytes"] is None
    assert sections["numa"]["nodes"] == []


def test_without_the_extension(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kttools_runtime

    monkeypatch.delattr(kttools_runtime, "_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "kttools_runtime._kernels", None)
    assert doctor.examine(machine).sections["kernels"]["extension"] == "missing"
    assert "build it: pip install ." in warnings(machine)


def test_kernel_tables_are_the_extension_s_own(machine: Path) -> None:
    from kttools_runtime import _kernels

    section = doctor.examine(machine).sections["kernels"]
    assert [row["name"] for row in section["tables"]] == [row["name"] for row in _kernels.isa_report()]
    assert section["chosen"] == _kernels.available_isas()[0]


def test_a_forced_table_that_does_not_run(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "KTTOOLS_ISA" not in warnings(machine)
    monkeypatch.setenv("KTTOOLS_ISA", "sse9")
    assert "KTTOOLS_ISA=sse9 does not run here" in warnings(machine)


def test_a_gpu_that_torch_cannot_use(machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("torch can use a GPU here")
    tool = tmp_path / "bin" / "nvidia-smi"
    write(tmp_path, "bin/nvidia-smi", "#!/bin/sh\necho 'Test GPU, 1.2, 24564 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    report = doctor.examine(machine)
    assert report.sections["gpu"]["driver"] == [{"name": "Test GPU", "driver": "1.2", "memory": "24564 MiB"}]
    assert "this torch cannot use it" in warnings(machine)
    write(tmp_path, "bin/nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert doctor.nvidia_smi() == []


def test_the_command_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {*doctor.SECTIONS, "warnings"} == set(document)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "kernels:" in text
    assert "scalar: runs here" in text


def test_what_plan_and_bench_measured_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One cached measurement: bench experts keeps its ceilings, plan recalls them, doctor shows them."""
    import torch

    from kttools.bench import experts
    from kttools.bench.shapes import LayerShape
    from kttools.plan import ceilings
    from kttools_runtime.experts import ExpertEngine

    monkeypatch.setattr(ceilings, "cache_dir", lambda: tmp_path)
    assert doctor.examine().sections["ceilings"] == {"measured": []}
    plan = experts.Plan(LayerShape("tiny", 128, 64, 6, 3), "int8", (1,), 2)
    monkeypatch.setattr(experts, "LEAST_PROBE_BYTES", 1 << 20)
    torch.set_num_threads(1)
    experts.run(ExpertEngine(1), plan, notice=lambda _: None)
    assert not ceilings.remembered()  # 1 MiB may lie in a cache
    monkeypatch.setattr(experts, "PROBE_BYTES", 1 << 20)
    experts.run(ExpertEngine(1), plan, notice=lambda _: None)
    mode = next(iter(ceilings.remembered())).split("; ")[1].removeprefix("numa ")
    found = ceilings.recall(ceilings.machine_key(1, mode, "int8"))
    assert found is not None
    (row,) = doctor.examine().sections["ceilings"]["measured"]
    assert row["gb_s"] == round(found.ceilings.bandwidth_bytes_s / 1e9, 1) > 0
    assert "measured here on" in row["when"]
    assert cli.main(["doctor"]) == 0
