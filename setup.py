"""Builds the one C++ extension, kttools_runtime._kernels; everything else is in pyproject.toml.

Each file in csrc/isa/ is compiled with the flags of the instruction set it is named after, and no other
file gets them: the extension loads on any x86-64 (or other) CPU and chooses its kernels at run time.
"""

import os
import platform
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# gcc 12 warns about its own intrinsics headers.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
ISA_FLAGS = {
    "kernels_avx2": AVX2,
    "kernels_avx512": AVX512,
    "kernels_amx": AMX,
    "latent_amx": AMX,
    "gqa_amx": AMX,
    "blocks_avx2": AVX2,
    "blocks_avx512": AVX512,
}
# Contraction where no bytes must be the same everywhere: norms, attention and routers of a decode step.
FILE_FLAGS = {**ISA_FLAGS, "row_math": ["-ffp-contract=fast"]}

# KTTOOLS_SANITIZE=address,undefined (or thread) builds the extension instrumented; see CONTRIBUTING.md.
SANITIZE = os.environ.get("KTTOOLS_SANITIZE", "")


class IsaBuildExt(build_ext):
    """build_ext with flags chosen by file name."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def with_isa_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):
            stem = os.path.splitext(os.path.basename(src))[0]
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *FILE_FLAGS.get(stem, [])], pp_opts)

        self.compiler._compile = with_isa_flags
        super().build_extensions()


def sources() -> list[str]:
    found = sorted(glob("csrc/*.cpp") + glob("csrc/isa/*.cpp"))
    if platform.machine() not in ("x86_64", "AMD64"):
        found = [s for s in found if os.path.splitext(os.path.basename(s))[0] not in ISA_FLAGS]
    return found


# -O1 and -g1 come last and count: gcc takes a minute a file to optimise instrumented kernels, and another to
# track variables for a debugger; lines are enough for a report.
sanitize_flags = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-O1", "-g1"] if SANITIZE else []
extension = Pybind11Extension(
    "kttools_runtime._kernels",
    sources(),
    include_dirs=["csrc"],
    depends=sorted(glob("csrc/*.h") + glob("csrc/isa/*.h")),
    cxx_std=17,
    # -ffp-contract=off: the same scales and the same quantised bytes from every compiler and CPU.
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-pthread", *sanitize_flags],
    extra_link_args=["-pthread", *sanitize_flags],
)

setup(ext_modules=[extension], cmdclass={"build_ext": IsaBuildExt})
