"""Environment variables of the runtime, read here and nowhere else.

KTTOOLS_ISA         name of the kernel table to force (see `kttools doctor`); an unknown name is an error
KTTOOLS_CPU_INFER   number of CPU threads of the expert engine when no option says otherwise
"""

import os

from .errors import UsageError


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


def default_threads() -> int:
    """KTTOOLS_CPU_INFER, else the number of CPUs this process may run on."""
    return cpu_infer() or len(os.sched_getaffinity(0))
