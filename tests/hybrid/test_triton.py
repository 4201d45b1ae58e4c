"""Our Triton kernel in Triton's interpreter on the CPU, against NumPy, and compiled for GPUs;
skipped by name without Triton."""

import os
import subprocess
import sys
from pathlib import Path

from tests.hybrid.compilers import need_triton

PROGRAM = """
import torch
from kttools_runtime import _kernels
from kttools_runtime.hybrid.triton_kernels import codes_matmul, slots_product
from kttools_runtime.weights import LinearWeights

generator = torch.Generator().manual_seed(0)
for n, k, group in ((33, 96, 32), (16, 200, 64), (40, 384, 128)):
    w = torch.randn(3, n, k, generator=generator)
    x = torch.randn(4, k, generator=generator)
    slots = torch.tensor([2, -1, 0, 2])
    for form in ("int4", "int8", "float"):
        if form == "int4":
            names = ("qweight", "group_scale", "group_zero", "row_scale")
            made = [_kernels.quantize_int4(m.numpy(), group) for m in w]
        elif form == "int8":
            names, made = ("qweight", "row_scale"), [_kernels.quantize_int8(m.numpy()) for m in w]
        else:
            names, made = ("weight",), [(m.numpy(),) for m in w]
        each = [{name: torch.from_numpy(a) for name, a in zip(names, m)} for m in made]
        exact = torch.stack([LinearWeights("w", k, form, parts).dequantized() for parts in each])
        stacked = {name: torch.stack([parts[name] for parts in each]) for name in names}
        wanted = torch.stack([x[p] @ exact[s].T if s >= 0 else torch.zeros(n) for p, s in enumerate(slots)])
        got = slots_product(x, stacked, slots)
        assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), (form, n, k)
        one = slots_product(x[:1], stacked, slots)
        assert float((one[0] - x[0] @ exact[2].T).abs().max()) <= 1e-4, form
        if form != "float":
            parts = dict(each[1])
            scale = parts.pop("row_scale")
            whole = codes_matmul(x, parts, scale)
            assert float((whole - x @ exact[1].T).abs().max()) <= 1e-5 * float(whole.abs().max()), form
print("ok")
"""


def test_kernel_in_the_interpreter() -> None:
    need_triton()
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kttools_runtime.hybrid import triton_source

kernel = triton.jit(triton_source.slots_kernel)
pointers = {"x": "bf16", "scale": "u8", "zero": "u8", "row_scale": "fp32", "slots": "i64", "out": "fp32"}
for form, codes in {"int4": "u8", "int8": "i8", "float": "bf16"}.items():
    types = {f"{name}_ptr": f"*{kind}" for name, kind in {**pointers, "codes": codes}.items()}
    types |= dict.fromkeys(("num_rows", "code_bytes", "num_groups", "x_stride"), "i32")
    fixed = {"COLUMNS": 7168, "GROUP": 128, "IS_INT4": form == "int4", "HAS_SCALE": form != "float"}
    fixed |= {"ROWS": 16, "INPUTS": 256}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    for capability in (80, 90):
        source = ASTSource(kernel, signature, places)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert f"sm_{capability}" in made.asm["ptx"] and len(made.asm["cubin"]) > 1000
print("ok")
"""


def test_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """Machine code of sm_80 and sm_90, without a GPU."""
    need_triton()
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
