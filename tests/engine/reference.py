"""NumPy oracles of the expert engine in float64 and exact integers, and the error bounds that belong to them.

Nothing here knows about strips, tiles or instruction sets: weights are row-major matrices. u = 2^-24 is half
an ulp of float32. A float32 sum of K products in any order is off by at most K u sum |a_i b_i| (to first
order), so every bound is carried element by element through the layer instead of being guessed.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kttools_runtime import _kernels

Array: TypeAlias = npt.NDArray[Any]

FORMATS = tuple(_kernels.FORMATS)
EXACT = tuple(name for name in FORMATS if name != "bf16")  # integer arithmetic
U = 2.0**-24
U_BF16 = 2.0**-8
# silu in float32: exp to 2e-7 (Cephes polynomial) or better, an add, a division, the product with `up`.
SILU_REL = 8 * U
SILU_SLOPE = 1.1  # largest |silu'|


def within(got: Array, expected: Array, bound: Array | float, what: str = "result") -> None:
    """Every |got - expected| at most its bound; written so that NaN fails."""
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: shape {got.shape}, expected {expected.shape}")
    error = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    bad = ~(error <= bound)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        limit = float(np.broadcast_to(bound, error.shape)[at])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {error.size} outside; first at {at}: got {got[at]:.9g}, "
            f"expected {expected[at]:.9g}, error {error[at]:.3g} above {limit:.3g}"
        )


def to_bf16(x: Array) -> Array:
    """uint16 bits of float32 rounded to nearest even (finite values)."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """float32 of uint16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_matrix(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    """Normal values that are exact in bf16, as float32."""
    return from_bf16(to_bf16(rng.standard_normal(shape).astype(np.float32) * np.float32(scale)))


def int8_rows(x: Array) -> tuple[Array, Array]:
    """Symmetric int8 of each row: q = round(x * 127 / max|x|) as float64, scale = max|x| / 127 as float32."""
    amax = np.abs(x).max(axis=1).astype(np.float32)
    live = amax >= np.float32(1e-30)
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=live)
    q = np.rint(x.astype(np.float32) * inverse[:, None]).astype(np.float64)
    return q, np.where(live, amax / np.float32(127), np.float32(0)).astype(np.float32)


def int4_weights(parts: tuple[Array, Array, Array, Array], k: int, group: int) -> tuple[Array, Array]:
    """(integers s * q - z as float64 [N, k], row_scale) of quantize_int4's arrays."""
    q, s, z, row_scale = parts
    codes = np.stack([q & 15, q >> 4], axis=2).reshape(len(q), -1).astype(np.int64)
    wide = [np.repeat(part.astype(np.int64), group, axis=1) for part in (s, z)]
    return (wide[0] * codes - wide[1])[:, :k].astype(np.float64), row_scale


def integer_weights(w: Array, name: str) -> tuple[Array, Array]:
    """(integers [N, K], row scale float32 [N]) that an integer format stores for w.

    Integers are float64: their sums stay far below 2^53, and NumPy multiplies matrices of floats faster.
    """
    if name == "int8":
        return int8_rows(w)
    group = int(name.removeprefix("int4_g"))
    return int4_weights(_kernels.quantize_int4(w, group), w.shape[1], group)


@dataclass(frozen=True, slots=True)
class Expert:
    """gate, up [I, H], down [H, I]: float32 holding bf16 values, and the format they are packed in."""

    gate: Array
    up: Array
    down: Array
    format: str

    @property
    def hidden_size(self) -> int:
        return int(self.gate.shape[1])

    @property
    def moe_intermediate_size(self) -> int:
        return int(self.gate.shape[0])

    def blob(self) -> Array:
        """The packed expert, 4096-aligned."""
        size = _kernels.expert_bytes(self.format, self.hidden_size, self.moe_intermediate_size)
        blob = aligned(size)
        _kernels.pack_expert(self.format, to_bf16(self.gate), to_bf16(self.up), to_bf16(self.down), blob)
        return blob


def aligned(size: int) -> Array:
    """uint8 [size] on a page boundary, filled with garbage."""
    raw = np.full(size + 4096, 0xA5, dtype=np.uint8)
    start = -raw.ctypes.data % 4096
    return raw[start : start + size]


def random_expert(rng: np.random.Generator, hidden: int, inner: int, name: str) -> Expert:
    """Weights scaled so that gate values are of order one: silu is neither linear nor dead."""
    return Expert(
        bf16_matrix(rng, inner, hidden, scale=hidden**-0.5),
        bf16_matrix(rng, inner, hidden, scale=hidden**-0.5),
        bf16_matrix(rng, hidden, inner, scale=inner**-0.5),
        name,
    )


def make_layer(engine: _kernels.Engine, experts: list[Expert]) -> _kernels.ExpertLayer:
    first = experts[0]
    sizes = first.hidden_size, first.moe_intermediate_size
    return _kernels.ExpertLayer(engine, *sizes, [e.format for e in experts], [e.blob() for e in experts])


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(x / (1.0 + np.exp(-x)))


def float_expert(expert: Expert, x: Array, rounds_hidden: bool = False) -> tuple[Array, Array]:
    """(y, bound) of one bf16 expert on x [M, H] in float64.

    rounds_hidden: the matrix unit takes the intermediate row in bf16, half an ulp of which is 2^-8; it also
    flushes denormals, far below any bound here.
    """
    x = x.astype(np.float64)
    gate_w, up_w, down_w = (w.astype(np.float64).T for w in (expert.gate, expert.up, expert.down))
    gate, up = x @ gate_w, x @ up_w
    gate_err, up_err = (len(gate_w) * U * (np.abs(x) @ np.abs(w)) for w in (gate_w, up_w))
    h = silu(gate) * up
    h_err = SILU_SLOPE * gate_err * (np.abs(up) + up_err) + np.abs(silu(gate)) * up_err + SILU_REL * np.abs(h)
    if rounds_hidden:
        h_err += U_BF16 * (np.abs(h) + h_err)
    bound = (len(down_w) * U * np.abs(h) + h_err) @ np.abs(down_w)
    return h @ down_w, bound


def integer_expert(expert: Expert, x: Array) -> tuple[Array, Array]:
    """(y, bound) of one int8 or int4 expert on x [M, H].

    The dot products are exact. Scales are two float32 roundings; silu's error may move a hidden value across
    a rounding boundary of its int8 code, and then (only then) it is off by one whole step.
    """
    xq, x_scale = int8_rows(x)
    gate_q, gate_s = integer_weights(expert.gate, expert.format)
    up_q, up_s = integer_weights(expert.up, expert.format)
    down_q, down_s = integer_weights(expert.down, expert.format)
    gate = xq @ gate_q.T * np.outer(x_scale, gate_s).astype(np.float64)
    up = xq @ up_q.T * np.outer(x_scale, up_s).astype(np.float64)
    h = silu(gate) * up
    # gate and up carry three roundings each (integer to float, product of scales, product)
    h_err = 3 * U * (SILU_SLOPE * np.abs(gate * up) + np.abs(h)) + SILU_REL * np.abs(h)
    step = np.abs(h).max(axis=1, keepdims=True) / 127
    exact = np.divide(h, step, out=np.zeros_like(h), where=step > 1e-30)
    hq = np.rint(exact)
    # the row's largest value moves with its own error, and the division and the product round too
    doubt = np.divide(h_err, step, out=np.zeros_like(h), where=step > 1e-30)
    doubt += np.abs(exact) * (h_err.max(axis=1, keepdims=True) / np.maximum(step * 127, 1e-300) + 3 * U)
    may_flip = np.abs(np.abs(exact - np.floor(exact)) - 0.5) <= doubt
    weights = np.abs(down_q).T * np.abs(down_s)
    y = hq @ down_q.T * step * down_s
    bound = (may_flip * step) @ weights + (np.abs(hq) * step * (SILU_REL + 12 * U)) @ weights
    return y, bound


def layer(
    experts: list[Expert], x: Array, ids: Array, weights: Array, rounds_hidden: bool = False
) -> tuple[Array, Array]:
    """(y [T, H], bound) of the whole layer; ids -1 are skipped."""
    y = np.zeros((len(x), experts[0].hidden_size))
    bound = np.zeros_like(y)
    size = np.zeros_like(y)
    for index, expert in enumerate(experts):
        tokens, ranks = np.nonzero(ids == index)
        if len(tokens) == 0:
            continue
        if expert.format == "bf16":
            part, error = float_expert(expert, x[tokens], rounds_hidden)
        else:
            part, error = integer_expert(expert, x[tokens])
        scale = weights[tokens, ranks].astype(np.float64)[:, None]
        np.add.at(y, tokens, part * scale)
        np.add.at(bound, tokens, error * np.abs(scale))
        np.add.at(size, tokens, np.abs(part * scale))
    return y, bound + (ids.shape[1] + 2) * U * size  # the weighted sum


def routing(
    rng: np.random.Generator, tokens: int, k: int, experts: int, missing: float = 0.0
) -> tuple[Array, Array]:
    """Distinct ids per token (int64 [T, k]), some of them -1, and weights (float32)."""
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int64)
    ids[rng.random(ids.shape) < missing] = -1
    return ids, rng.uniform(0.1, 1.0, ids.shape).astype(np.float32)


def forward(native: _kernels.ExpertLayer, x: Array, ids: Array, weights: Array) -> Array:
    """The kernels' output; x float32 or bf16 bits."""
    hidden = x.shape[1]
    out = np.full((len(x), hidden), np.nan, dtype=np.float32)
    native.forward(x, ids, weights, out)
    return out
