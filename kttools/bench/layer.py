"""A layer of random experts in huge pages, made fast and one expert after another.

One expert with Gaussian weights is quantised (block formats: random blocks); the others are copies of its
blob, at their own addresses. The kernels' time does not depend on the values, and every copy has to be read
from memory like any other.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kttools_runtime import _kernels
from kttools_runtime.experts import ExpertEngine, ExpertLayer, as_numpy, pack_format
from kttools_runtime.huge_pages import huge_memory

from .shapes import LayerShape

# ggml's blocks: inputs, bytes, and their float16 scales (place, size for weights of about unit variance).
BLOCKS = {
    "q4_k": (256, 144, ((0, 1 / 180), (2, 1 / 25))),
    "q5_k": (256, 176, ((0, 1 / 360), (2, 1 / 25))),
    "q6_k": (256, 210, ((208, 1 / 1350),)),
    "q8_0": (32, 34, ((0, 1 / 74),)),
}


@dataclass(frozen=True, slots=True)
class RandomLayer:
    """memory: every blob, one after the other."""

    layer: ExpertLayer
    memory: np.ndarray
    expert_bytes: int


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


def pack_random_blocks(format: str, shape: LayerShape, blob: np.ndarray, seed: int) -> None:
    """An expert of ggml blocks with random codes and scales of ordinary size, into `blob`."""
    generator = np.random.default_rng(seed)
    hidden, inner = shape.hidden_size, shape.moe_intermediate_size
    gate_up = next(name for name in BLOCKS if format.startswith(name))
    down = format.removeprefix(gate_up).removeprefix("_") or gate_up

    def matrix(name: str, rows: int, columns: int) -> np.ndarray:
        inputs, size, scales = BLOCKS[name]
        data = generator.integers(0, 256, (rows * (columns // inputs), size), dtype=np.uint8)
        for at, unit in scales:
            values = generator.uniform(0.5, 1.5, len(data)) * unit * columns**-0.5
            data[:, at : at + 2] = values.astype("<f2")[:, None].view(np.uint8)
        return data.reshape(-1)

    parts = matrix(gate_up, inner, hidden), matrix(gate_up, inner, hidden), matrix(down, hidden, inner)
    _kernels.pack_ggml_expert(format, hidden, inner, *parts, blob)


def random_layer(engine: ExpertEngine, shape: LayerShape, format: str, seed: int = 0) -> RandomLayer:
    """A layer for timing. format: a pack format or its alias."""
    name = pack_format(format)
    size = _kernels.expert_bytes(name, shape.hidden_size, shape.moe_intermediate_size)
    memory = huge_memory(size * shape.num_experts)
    blobs = [memory[e * size : (e + 1) * size] for e in range(shape.num_experts)]
    if name in _kernels.BLOCK_FORMATS:
        pack_random_blocks(name, shape, blobs[0], seed)
    else:
        gate, up, down = gaussian_expert(shape, seed)
        _kernels.pack_expert(name, as_numpy(gate), as_numpy(up), as_numpy(down), blobs[0])
    for blob in blobs[1:]:
        blob[:] = blobs[0]
    sizes = shape.hidden_size, shape.moe_intermediate_size
    layer = engine.layer_from_blobs(*sizes, [name] * shape.num_experts, blobs)
    return RandomLayer(layer, memory, size)
