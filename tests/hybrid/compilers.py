"""Compilers for GPUs that run without one: Triton, and nvcc from the path or from the package of that name.

`make dev` installs both on Linux x86_64. Elsewhere the tests that need them are skipped by name; where CI
runs on such a machine a missing one is a failure, for then nothing would have been compiled.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import pytest

IS_PROMISED = bool(os.environ.get("CI")) and sys.platform == "linux" and platform.machine() == "x86_64"


def find_nvcc() -> Path | None:
    """From the path, or out of the package nvidia-cuda-nvcc."""
    found = shutil.which("nvcc")
    if found is not None:
        return Path(found)
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    places = [Path(str(file.locate())) for file in files if file.name == "nvcc"]
    return next((place for place in places if os.access(place, os.X_OK)), None)


def need_nvcc() -> Path:
    """nvcc; skips the test by name without it."""
    nvcc = find_nvcc()
    if nvcc is None:
        _missing("no nvcc")
        raise AssertionError("a skip or a failure leaves the test")
    return nvcc


def need_triton() -> None:
    """Skips the test by name without Triton."""
    if importlib.util.find_spec("triton") is None:
        _missing("Triton is not installed")


def _missing(what: str) -> None:
    if IS_PROMISED:
        pytest.fail(f"{what}: make dev installs it here")
    pytest.skip(what)
