"""The one CUDA function we call, resolved at run time: against a stand-in library, and CUDA's header."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kttools_runtime import _kernels
from tests.hybrid.compilers import need_nvcc

REPO = Path(__file__).resolve().parents[2]
STAND_IN = """
extern "C" int cudaLaunchHostFunc(void* stream, void (*function)(void*), void* argument) {
  if (stream == nullptr) return 400;
  function(argument);
  return 0;
}
"""
PROGRAM = """
import ctypes, sys
from kttools_runtime import _kernels
assert _kernels.loaded_cudart() == ""
try:
    _kernels.launch_host_function(1, 1, 1)
    raise SystemExit("resolved nothing")
except RuntimeError as error:
    assert "no CUDA runtime" in str(error), error
ctypes.CDLL(sys.argv[1])
assert _kernels.loaded_cudart().endswith("libcudart.so.99"), _kernels.loaded_cudart()
called = []
function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda argument: called.append(argument))
address = ctypes.cast(function, ctypes.c_void_p).value
_kernels.launch_host_function(1, address, 77)
assert called == [77], called
try:
    _kernels.launch_host_function(0, address, 78)
    raise SystemExit("an error code passes")
except RuntimeError as error:
    assert "code 400" in str(error), error
"""


def test_resolved_from_the_loaded_runtime(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler for the stand-in of libcudart")
    source, library = tmp_path / "cudart.cpp", tmp_path / "libcudart.so.99"
    source.write_text(STAND_IN, encoding="ascii")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_cuda_it_says_so() -> None:
    if torch.cuda.is_available() or _kernels.loaded_cudart():
        pytest.skip("a CUDA runtime is loaded")
    with pytest.raises(RuntimeError, match="this torch has no CUDA"):
        _kernels.launch_host_function(1, 1, 1)


def test_signature_agrees_with_the_header(tmp_path: Path) -> None:
    """Compiled by nvcc: our declaration converts to CUDA's and back."""
    nvcc = str(need_nvcc())
    source = REPO / "tests" / "csrc" / "cuda_signature.cu"
    command = [
        nvcc,
        "-allow-unsupported-compiler",
        "-std=c++17",
        "-c",
        str(source),
        "-o",
        str(tmp_path / "cuda_signature.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
