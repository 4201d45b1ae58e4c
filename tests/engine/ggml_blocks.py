"""Random ggml blocks, and an oracle of the block formats that knows nothing of strips, tiles or tables."""

from dataclasses import dataclass

import gguf
import numpy as np

from kttools_runtime import _kernels
from tests.engine.reference import SILU_REL, SILU_SLOPE, Array, U, aligned, silu

# format: ggml's type, inputs and bytes of a block, and (place, size) of its float16 scales for unit variance.
KINDS = {
    "q4_k": (gguf.GGMLQuantizationType.Q4_K, 256, 144, ((0, 1 / 180), (2, 1 / 25))),
    "q5_k": (gguf.GGMLQuantizationType.Q5_K, 256, 176, ((0, 1 / 360), (2, 1 / 25))),
    "q6_k": (gguf.GGMLQuantizationType.Q6_K, 256, 210, ((208, 1 / 1350),)),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, 32, 34, ((0, 1 / 74),)),
}
FORMATS = tuple(_kernels.BLOCK_FORMATS)
BLOCK = 256  # inputs of an activation block


def parts(name: str) -> tuple[str, str]:
    """(format of gate and up, format of down)."""
    first = next(kind for kind in KINDS if name.startswith(kind))
    return first, name.removeprefix(first).removeprefix("_") or first


def random_rows(rng: np.random.Generator, kind: str, rows: int, columns: int) -> Array:
    """uint8 [rows, bytes]: every code and integer scale can occur, float16 scales are of sensible size."""
    _, inputs, size, scales = KINDS[kind]
    data = rng.integers(0, 256, (rows, columns // inputs, size), dtype=np.uint8)
    for at, unit in scales:
        values = rng.uniform(0.5, 1.5, data.shape[:2]) * unit * columns**-0.5
        data[:, :, at : at + 2] = values.astype("<f2")[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def weights(kind: str, rows: Array) -> Array:
    """float32 [rows, columns], by the gguf package."""
    return np.asarray(gguf.quants.dequantize(rows, KINDS[kind][0]), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class BlockExpert:
    """gate, up [I rows of H], down [H rows of I] as ggml's bytes."""

    format: str
    hidden_size: int
    moe_intermediate_size: int
    gate: Array
    up: Array
    down: Array

    def floats(self) -> tuple[Array, Array, Array]:
        into, out = parts(self.format)
        return weights(into, self.gate), weights(into, self.up), weights(out, self.down)

    def blob(self) -> Array:
        sizes = self.hidden_size, self.moe_intermediate_size
        blob = aligned(_kernels.expert_bytes(self.format, *sizes))
        data = (matrix.reshape(-1) for matrix in (self.gate, self.up, self.down))
        _kernels.pack_ggml_expert(self.format, *sizes, *data, blob)
        return blob


def random_expert(rng: np.random.Generator, hidden: int, inner: int, name: str) -> BlockExpert:
    into, out = parts(name)
    gate, up = (random_rows(rng, into, inner, hidden) for _ in range(2))
    return BlockExpert(name, hidden, inner, gate, up, random_rows(rng, out, hidden, inner))


def make_layer(engine: _kernels.Engine, experts: list[BlockExpert]) -> _kernels.ExpertLayer:
    sizes = experts[0].hidden_size, experts[0].moe_intermediate_size
    return _kernels.ExpertLayer(engine, *sizes, [e.format for e in experts], [e.blob() for e in experts])


def block_codes(x: Array) -> tuple[Array, Array]:
    """(q float64 [M, K], step float64 [M, K]) of activations in int8 with a scale for every 256."""
    count, columns = x.shape
    padded = np.zeros((count, -(-columns // BLOCK) * BLOCK), dtype=np.float32)
    padded[:, :columns] = x
    blocks = padded.reshape(count, -1, BLOCK)
    amax = np.abs(blocks).max(axis=2, keepdims=True)
    live = amax >= np.float32(1e-30)
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=live)
    q = np.rint(blocks * inverse).reshape(count, -1)[:, :columns].astype(np.float64)
    step = np.where(live, amax / np.float32(127), np.float32(0))
    return q, np.repeat(step.astype(np.float64), BLOCK, axis=2).reshape(count, -1)[:, :columns]


def sum_error(x: Array, w: Array, kind: str) -> Array:
    """Bound of a float32 sum over blocks whose integers are exact: [M, N].

    A block's scaled sum and what its minimum takes away are each at most |x| times the row's range (twice its
    largest weight), and pass through five roundings; then blocks are added up.
    """
    roundings = 5 + x.shape[1] / KINDS[kind][1]
    return roundings * U * np.abs(x).sum(axis=1, keepdims=True) * 4 * np.abs(w).max(axis=1)


def expert(e: BlockExpert, x: Array) -> tuple[Array, Array]:
    """(y, bound) of one expert on x [M, H] by the vector kernels.

    silu's error may move a hidden value across a rounding boundary of its code, and then it is off by a step.
    """
    gate_w, up_w, down_w = (w.astype(np.float64) for w in e.floats())
    q, step = block_codes(x)
    exact = q * step
    gate, up = exact @ gate_w.T, exact @ up_w.T
    into, out = parts(e.format)
    gate_err, up_err = sum_error(exact, gate_w, into), sum_error(exact, up_w, into)
    h = silu(gate) * up
    h_err = SILU_SLOPE * gate_err * (np.abs(up) + up_err) + np.abs(silu(gate)) * up_err + SILU_REL * np.abs(h)
    hq, h_step = block_codes(h.astype(np.float32))
    live = h_step > 1e-30
    ratio = np.divide(h, h_step, out=np.zeros_like(h), where=live)
    doubt = np.divide(h_err, h_step, out=np.zeros_like(h), where=live)
    largest = (
        np.maximum.reduceat(doubt, range(0, h.shape[1], BLOCK), axis=1) / 127
    )  # what the scale is off by
    largest = np.repeat(largest, BLOCK, axis=1)[:, : h.shape[1]] + 3 * U
    doubt = doubt + np.abs(ratio) * largest
    may_flip = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) <= doubt
    hidden = hq * h_step
    bound = (may_flip * h_step + largest * np.abs(hidden)) @ np.abs(down_w).T
    return hidden @ down_w.T, bound + sum_error(hidden, down_w, out)
