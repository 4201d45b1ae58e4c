"""Environment variables of the runtime, read here and nowhere else.

KTTOOLS_ISA         name of the kernel table to force (see `kttools doctor`); an unknown name is an error
KTTOOLS_CPU_INFER   number of CPU threads of the expert engine when no option says otherwise
KTTOOLS_DEVICE_LINEAR    kind of int4 and int8 linears on a device: auto (default), packed, triton or dense
KTTOOLS_DEVICE_EXPERTS   codes of hot experts on a device: auto (default), int4 or pack
KTTOOLS_SIMULATED_VRAM   memory of each simulated device (cpu:0), such as 24G or 50M; unset: none of its own
KTTOOLS_ENGINE_TIMEOUT   seconds a device waits for one layer's experts before the step fails (default 60)
XDG_CACHE_HOME      where calibrations of this machine are kept, in kttools/ (default ~/.cache)

Two variables of torch's CPU kernels are set unless they are: LRU_CACHE_CAPACITY and
ONEDNN_PRIMITIVE_CACHE_CAPACITY; see bound_kernel_caches().
"""

import os
from pathlib import Path

from .errors import UsageError

KEPT_KERNELS = 32
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def forced_isa() -> str | None:
    """KTTOOLS_ISA, or None when unset or empty."""
    return os.environ.get("KTTOOLS_ISA") or None


def cpu_infer() -> int | None:
    """KTTOOLS_CPU_INFER as a positive int, or None when unset. Raises UsageError on anything else."""
    text = os.environ.get("KTTOOLS_CPU_INFER")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"KTTOOLS_CPU_INFER must be a positive integer, got {text!r}")
    return int(text)


def bound_kernel_caches() -> None:
    """Keeps memory steady over prompts of many lengths; has effect before torch's first matrix product.

    For every shape torch's bf16 product generates code of about 0.8 MiB (oneDNN, AMX) and keeps 1024 of them,
    twice. A prefill needs fewer than KEPT_KERNELS; another length makes its own anyway.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_KERNELS))


def default_threads() -> int:
    """KTTOOLS_CPU_INFER, else the number of CPUs this process may run on."""
    return cpu_infer() or len(os.sched_getaffinity(0))


def device_linear() -> str:
    """KTTOOLS_DEVICE_LINEAR, or "auto"."""
    return os.environ.get("KTTOOLS_DEVICE_LINEAR") or "auto"


def device_experts() -> str:
    """KTTOOLS_DEVICE_EXPERTS, or "auto"."""
    return os.environ.get("KTTOOLS_DEVICE_EXPERTS") or "auto"


def simulated_vram() -> int | None:
    """KTTOOLS_SIMULATED_VRAM in bytes, or None when unset. Raises UsageError on anything else."""
    text = os.environ.get("KTTOOLS_SIMULATED_VRAM")
    if not text:
        return None
    unit = UNITS.get(text[-1].upper(), 0)
    if not unit or not text[:-1].isdecimal() or int(text[:-1]) < 1:
        raise UsageError(f"KTTOOLS_SIMULATED_VRAM must be a size such as 24G or 50M, got {text!r}")
    return int(text[:-1]) * unit


def engine_timeout_s() -> float:
    """KTTOOLS_ENGINE_TIMEOUT in seconds. Raises UsageError unless it is a number above 0, at most a day."""
    text = os.environ.get("KTTOOLS_ENGINE_TIMEOUT") or "60"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise UsageError(f"KTTOOLS_ENGINE_TIMEOUT must be seconds above 0, at most 86400, got {text!r}")
    return seconds


def cache_dir() -> Path:
    """Derived files that can be made again. Not created."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "kttools"
