"""What this machine has, what kttools can use of it, and what to change. Reads only; needs no privileges."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from kttools_runtime.version import __version__

from .config_file import config_paths
from .dirs import cache_dir

DEPENDENCIES = (
    "click", "datasets", "gguf", "huggingface_hub", "jinja2", "numpy", "psutil", "safetensors",
    "tokenizers", "torch", "tqdm", "xxhash", "zstandard",
)  # fmt: skip
NVIDIA_SMI_SECONDS = 10
LOW_DISK_BYTES = 10 << 30


@dataclass(frozen=True, slots=True)
class Warning:
    """Something that costs speed or stops a feature, and what to do about it."""

    what: str
    remedy: str


@dataclass(slots=True)
class Report:
    """Facts by section, in the order they are shown, and warnings."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[Warning] = field(default_factory=list)

    def warn(self, what: str, remedy: str) -> None:
        self.warnings.append(Warning(what, remedy))

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**self.sections, "warnings": [asdict(warning) for warning in self.warnings]}


def examine(root: Path = Path("/")) -> Report:
    """The whole report. root: where proc/ and sys/ are (a test's own tree)."""
    report = Report()
    for name, section in SECTIONS.items():
        report.sections[name] = section(report, root)
    return report


def _software(report: Report, _: Path) -> dict[str, Any]:
    versions = {name: _version(name) for name in DEPENDENCIES}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        report.warn(f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return {
        "kttools": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "config_files": [str(path) for path in config_paths()],
        **{name: version or "missing" for name, version in versions.items()},
    }


def _cpu(report: Report, root: Path) -> dict[str, Any]:
    text = _read(root / "proc/cpuinfo") or ""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cpus(root)
    if quota is not None and quota < allowed:
        report.warn(
            f"a cgroup limits this process to {quota:g} CPUs of the {allowed} it may run on",
            f"pass --cpu_infer {max(int(quota), 1)}, or raise the container's CPU limit",
        )
    sockets, cores = physical_cores(text)
    return {
        "model": _first(r"^model name\s*:\s*(.+)$", text) or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "sockets": sockets,
        "physical_cores": cores,
        "logical_cpus": os.cpu_count(),
        "allowed_cpus": allowed,
        "cgroup_cpus": quota,
    }


def _kernels(report: Report, _: Path) -> dict[str, Any]:
    try:
        from kttools_runtime import _kernels
    except ImportError as error:
        report.warn(
            f"the compiled extension does not load: {error}",
            "build it: pip install . (or, in a checkout, python setup.py build_ext --inplace)",
        )
        return {"extension": "missing", "tables": []}
    tables = [dict(row) for row in _kernels.isa_report()]
    features = dict(_kernels.cpu_features())
    if features.get("amx_tile") and not features.get("amx_permission"):
        report.warn(
            "the CPU has AMX but the kernel does not let this process use it",
            "use Linux 5.16 or newer, and a container or hypervisor that passes AMX on",
        )
    if tables and not any(row["supported"] for row in tables if row["name"] != "scalar"):
        report.warn(
            "only the scalar kernels run on this CPU, and they are slow", "use a CPU with AVX2 or better"
        )
    forced = os.environ.get("KTTOOLS_ISA")
    runnable = [str(row["name"]) for row in tables if row["supported"]]
    if forced and forced not in runnable:
        report.warn(
            f"KTTOOLS_ISA={forced} does not run here, every model will refuse to load",
            f"unset it, or use one of {', '.join(runnable)}",
        )
    return {
        "extension": "built",
        "chosen": forced or next(iter(runnable), None),
        "forced": forced,
        "tables": tables,
        "features": [name for name, present in features.items() if present],
        "missing_features": [name for name, present in features.items() if not present],
    }


def _memory(report: Report, root: Path) -> dict[str, Any]:
    info = meminfo(_read(root / "proc/meminfo") or "")
    huge = transparent_hugepages(_read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    if huge == "never":
        report.warn(
            "transparent hugepages are off: more TLB misses on large weights",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    if info.get("SwapTotal", 0) > info.get("SwapFree", 0) and info.get("MemAvailable", 0) < 2 << 30:
        report.warn("the machine is swapping", "free memory, or run a smaller model")
    return {
        "total_bytes": info.get("MemTotal"),
        "available_bytes": info.get("MemAvailable"),
        "cgroup_limit_bytes": cgroup_memory(root),
        "transparent_hugepages": huge,
        "hugepages_total": info.get("HugePages_Total"),
        "hugepages_free": info.get("HugePages_Free"),
        "hugepage_bytes": info.get("Hugepagesize"),
        "memlock_limit_bytes": _memlock(),
    }


def _numa(report: Report, root: Path) -> dict[str, Any]:
    nodes = numa_nodes(root)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    used = [n for n in nodes if allowed & set(n["cpus"])]
    if len(nodes) > 1 and len(used) == 1:
        report.warn(
            f"the process is bound to NUMA node {used[0]['node']} of {len(nodes)}",
            "start it without numactl or taskset to use every node's memory bandwidth",
        )
    if _read(root / "proc/sys/kernel/numa_balancing", "").strip() == "1" and len(nodes) > 1:
        report.warn(
            "automatic NUMA balancing moves pages while the model runs",
            "echo 0 | sudo tee /proc/sys/kernel/numa_balancing",
        )
    return {"nodes": [{**n, "cpus": len(n["cpus"])} for n in nodes]}


def _disk(report: Report, _: Path) -> dict[str, Any]:
    place = next((p for p in (cache_dir(), *cache_dir().parents) if p.is_dir()), Path("/"))
    here, cache = shutil.disk_usage(Path.cwd()).free, shutil.disk_usage(place).free
    if cache < LOW_DISK_BYTES:
        report.warn(
            f"{cache >> 20} MiB free for the cache in {cache_dir()}",
            "set XDG_CACHE_HOME to a larger disk, or quantize with -o there",
        )
    return {
        "here": str(Path.cwd()),
        "here_free_bytes": here,
        "cache": str(cache_dir()),
        "cache_free_bytes": cache,
    }


def _ceilings(_: Report, __: Path) -> dict[str, Any]:
    """What `plan` or `bench experts` measured here and remembers; nothing is measured for this report."""
    try:
        from kttools.plan.ceilings import remembered
    except ImportError:  # no extension, which its own section reports
        return {"measured": []}
    return {
        "measured": [
            {
                "with": key,
                "gb_s": round(entry.ceilings.bandwidth_bytes_s / 1e9, 1),
                "tops": round(entry.ceilings.compute_ops_s / 1e12, 2),
                "when": entry.source,
            }
            for key, entry in remembered().items()
        ]
    }


def _gpu(report: Report, _: Path) -> dict[str, Any]:
    driver = nvidia_smi()
    facts: dict[str, Any] = {"driver": driver, "torch_cuda": None, "devices": []}
    try:
        import torch
    except ImportError:
        return facts
    facts["torch_cuda"] = torch.version.cuda
    if torch.version.cuda is not None and torch.cuda.is_available():
        facts["devices"] = [_gpu_device(torch, index) for index in range(torch.cuda.device_count())]
    if driver and not facts["devices"]:
        report.warn(
            "there is a GPU, but this torch cannot use it"
            + ("" if torch.version.cuda else " (a CPU-only build)"),
            "install a torch build with CUDA that fits the driver",
        )
    return facts


def _gpu_device(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return {
        "name": properties.name,
        "total_bytes": properties.total_memory,
        "compute_capability": capability,
    }


SECTIONS: dict[str, Callable[[Report, Path], dict[str, Any]]] = {
    "software": _software,
    "cpu": _cpu,
    "kernels": _kernels,
    "memory": _memory,
    "numa": _numa,
    "disk": _disk,
    "ceilings": _ceilings,
    "gpu": _gpu,
}


def meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo in bytes (counts of pages stay counts)."""
    rows = re.findall(r"^(\w+)(?:\(\w+\))?:\s+(\d+)( kB)?$", text, re.M)
    return {name: int(value) * (1024 if unit else 1) for name, value, unit in rows}


def transparent_hugepages(text: str | None) -> str | None:
    """The mode in brackets: always, madvise or never."""
    return _first(r"\[(\w+)\]", text or "")


def physical_cores(cpuinfo: str) -> tuple[int | None, int | None]:
    """(sockets, physical cores) from /proc/cpuinfo; None where it does not say."""
    pairs = re.findall(r"^physical id\s*:\s*(\d+)$.*?^core id\s*:\s*(\d+)$", cpuinfo, re.M | re.S)
    return (len({socket for socket, _ in pairs}), len(set(pairs))) if pairs else (None, None)


def cpu_list(text: str) -> list[int]:
    """A kernel CPU list, "0-3,8": [0, 1, 2, 3, 8]."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
            cpus.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return cpus


def numa_nodes(root: Path) -> list[dict[str, Any]]:
    """Every node with its CPUs and memory, in order."""
    base = root / "sys/devices/system/node"
    found = [(int(m[1]), p) for p in base.glob("node*") if (m := re.fullmatch(r"node(\d+)", p.name))]
    nodes = []
    for number, path in sorted(found):
        info = meminfo(re.sub(r"^Node \d+ ", "", _read(path / "meminfo", ""), flags=re.M))
        nodes.append(
            {
                "node": number,
                "cpus": cpu_list(_read(path / "cpulist", "")),
                "total_bytes": info.get("MemTotal"),
                "free_bytes": info.get("MemFree"),
            }
        )
    return nodes


def cgroup_cpus(root: Path) -> float | None:
    """CPUs a cgroup (v2, else v1) grants this process, or None without a limit."""
    text = _read(root / "sys/fs/cgroup/cpu.max", "").split()
    if len(text) == 2 and text[0].isdecimal():
        return int(text[0]) / int(text[1])
    quota = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "").strip()
    period = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "").strip()
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def cgroup_memory(root: Path) -> int | None:
    """Bytes a cgroup (v2, else v1) grants this process, or None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(root / "sys/fs/cgroup" / name, "").strip()
        if text.isdecimal() and int(text) < 1 << 60:  # v1 writes "no limit" as a huge number
            return int(text)
    return None


def nvidia_smi() -> list[dict[str, str]]:
    """GPUs as the driver's own tool lists them; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(("name", "driver", "memory"), row, strict=True)) for row in rows if len(row) == 3]


def _memlock() -> int | None:
    """The locked-memory limit in bytes, None when unlimited."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path, default: str | None = None) -> Any:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return default


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text, re.M)
    return match[1].strip() if match else None
