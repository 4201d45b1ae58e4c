"""Our Triton kernels: rows times int4 or int8 codes as a shard has them, of one matrix or of chosen experts.

Bound by the bytes of the codes at one row, which is what a decode step is. Not measured on a GPU; the
arithmetic is proven in Triton's interpreter on the CPU. Triton is optional and imported on first use.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from kttools_runtime.errors import HardwareError

BLOCK_ROWS = 16  # output rows of a program: enough programs for 100 multiprocessors from N = 2048 on
BLOCK_INPUTS = 256


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def require_triton() -> None:
    """Raises HardwareError where the package is missing."""
    if not has_triton():
        raise HardwareError("Triton is not installed; pip install triton, or use another kind of linear")


def codes_matmul(x: Tensor, parts: dict[str, Tensor], row_scale: Tensor) -> Tensor:
    """x [T, K] times one matrix [N, K] of codes -> float32 [T, N]."""
    stacked = {name: part[None] for name, part in {**parts, "row_scale": row_scale}.items()}
    slots = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return slots_product(x, stacked, slots)


def slots_product(x: Tensor, parts: dict[str, Tensor], slots: Tensor) -> Tensor:
    """Row p of x [P or 1, K] times matrix slots[p] of [S, N, K] codes -> float32 [P, N]; -1: zeros.

    The slots are read by the device, so that the choice of experts can change in a captured step.
    """
    require_triton()
    codes = parts["weight"] if "weight" in parts else parts["qweight"]
    rows, inputs = codes.shape[1], x.shape[-1]
    out = torch.empty(len(slots), rows, dtype=torch.float32, device=x.device)
    is_int4 = "group_scale" in parts
    scale = parts["group_scale"] if is_int4 else codes
    zero = parts["group_zero"] if is_int4 else codes
    row_scale = parts.get("row_scale", out)
    grid = (-(-rows // BLOCK_ROWS), len(slots))
    _kernel()[grid](
        x,
        codes,
        scale,
        zero,
        row_scale,
        slots,
        out,
        rows,
        codes.shape[2],
        scale.shape[2],
        0 if x.shape[0] == 1 else x.stride(0),
        COLUMNS=inputs,
        GROUP=2 * codes.shape[2] // scale.shape[2] if is_int4 else 1,
        IS_INT4=is_int4,
        HAS_SCALE="row_scale" in parts,
        ROWS=BLOCK_ROWS,
        INPUTS=BLOCK_INPUTS,
    )
    return out


@functools.cache
def _kernel() -> Any:
    """The kernel, made when Triton is first needed."""
    import triton

    from . import triton_source

    return triton.jit(triton_source.slots_kernel)
