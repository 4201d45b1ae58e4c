"""Environment variables of the runtime, read here and nowhere else.

KTTOOLS_ISA         name of the kernel table to force (see `kttools doctor`); an unknown name is an error
KTTOOLS_CPU_INFER   number of CPU threads of the expert engine when no option says otherwise

Two variables of torch's CPU kernels are set unless they are: LRU_CACHE_CAPACITY and
ONEDNN_PRIMITIVE_CACHE_CAPACITY; see bound_kernel_caches().
"""

import os

from .errors import UsageError

KEPT_KERNELS = 32


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
