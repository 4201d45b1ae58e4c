"""A layer of random experts in huge pages, made fast and one expert after another.

One expert with Gaussian weights is quantised; the others are copies of its blob, at their own addresses. The
kernels' time does not depend on the values, and every copy has to be read from memory like any other.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kttools_runtime import _kernels
from kttools_runtime.errors import ResourceError
from kttools_runtime.experts import ExpertEngine, ExpertLayer, as_numpy, pack_format

from .shapes import LayerShape

HUGE_PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class RandomLayer:
    """memory: every blob, one after the other."""

    layer: ExpertLayer
    memory: np.ndarray
    expert_bytes: int


def huge_memory(size: int) -> np.ndarray:
    """uint8 [size], zero, on a 2 MiB boundary; huge pages are asked for. Raises ResourceError."""
    try:
        # Private: shared memory gets no huge pages on most systems.
        mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ResourceError(f"cannot map {size >> 20} MiB for the layer: {error}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(mapping, dtype=np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE
    return raw[start : start + size]


def huge_page_share(memory: np.ndarray) -> float | None:
    """Part of the mapping around `memory` that lies in huge pages, 0 to 1; None where Linux does not say."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return None
    address, is_ours, resident = memory.ctypes.data, False, 0
    for line in smaps.read_text(encoding="utf-8").splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, _, end = first.partition("-")
            is_ours = int(start, 16) <= address < int(end, 16)
        elif is_ours and first == "Rss:":
            resident = int(rest[0])
        elif is_ours and first == "AnonHugePages:":
            return int(rest[0]) / resident if resident else 0.0
    return None


def gaussian_expert(shape: LayerShape, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate, up [I, H] and down [H, I] in bf16, scaled so that the layer keeps the size of its input."""
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate = shape.hidden_size, shape.moe_intermediate_size

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(torch.bfloat16)

    return matrix(intermediate, hidden), matrix(intermediate, hidden), matrix(hidden, intermediate)


def random_layer(engine: ExpertEngine, shape: LayerShape, format: str, seed: int = 0) -> RandomLayer:
    """A layer for timing. format: a pack format or its alias."""
    name = pack_format(format)
    size = _kernels.expert_bytes(name, shape.hidden_size, shape.moe_intermediate_size)
    memory = huge_memory(size * shape.num_experts)
    blobs = [memory[e * size : (e + 1) * size] for e in range(shape.num_experts)]
    gate, up, down = gaussian_expert(shape, seed)
    _kernels.pack_expert(name, as_numpy(gate), as_numpy(up), as_numpy(down), blobs[0])
    for blob in blobs[1:]:
        blob[:] = blobs[0]
    sizes = shape.hidden_size, shape.moe_intermediate_size
    layer = engine.layer_from_blobs(*sizes, [name] * shape.num_experts, blobs)
    return RandomLayer(layer, memory, size)
