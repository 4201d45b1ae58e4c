"""Expert layers and packed matrices against float64 and exact integers, over every kernel table and format.

Tolerances are carried element by element in reference.py. The sweeps pass every remainder of the kernels: 1
to 40 rows (tile heights, one and two tiles, the vector kernels), the borders at 64 and 512 rows, N beside
multiples of 16 and 32, K beside multiples of 32, 64 and 128, every number of streams, and M x K beyond one
block of activations.
"""

import numpy as np
import pytest

from kttools_runtime import _kernels
from tests.engine import reference as ref

SIZES = [(320, 96), (72, 40), (64, 32), (33, 17), (257, 130)]  # hidden_size, moe_intermediate_size
ROWS = [*range(1, 41), 63, 64, 65, 130, 513, 1100]
FEW_ROWS = [1, 2, 3, 4, 7, 16, 17, 33, 70]
N_SIZES = [1, 15, 16, 17, 31, 32, 33, 47, 65]
K_SIZES = [1, 2, 3, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 191, 257]


def uses_matrix_unit(isa: str) -> bool:
    return isa == "amx"


def one_expert(rows: int) -> tuple[ref.Array, ref.Array]:
    return np.zeros((rows, 1), dtype=np.int64), np.linspace(0.25, 1.5, rows, dtype=np.float32)[:, None].copy()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ref.FORMATS)
def test_expert_by_rows(isa: str, name: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    expert = ref.random_expert(rng, *size, name)
    native = ref.make_layer(_kernels.Engine(2, isa), [expert])
    for rows in ROWS if size in SIZES[:2] else FEW_ROWS:
        x = ref.bf16_matrix(rng, rows, size[0])
        ids, weights = one_expert(rows)
        expected, bound = ref.layer([expert], x, ids, weights)
        ref.within(ref.forward(native, x, ids, weights), expected, bound, f"{rows} rows, float32")
        if name == "bf16" and uses_matrix_unit(isa):
            expected, bound = ref.layer([expert], x, ids, weights, rounds_hidden=True)
        ref.within(ref.forward(native, ref.to_bf16(x), ids, weights), expected, bound, f"{rows} rows, bf16")


@pytest.mark.parametrize("tokens", [1, 2, 37, 300])
def test_layer_of_mixed_formats(isa: str, tokens: int) -> None:
    rng = np.random.default_rng(2)
    experts = [ref.random_expert(rng, 136, 48, name) for name in (*ref.FORMATS, "int8", "bf16")]
    native = ref.make_layer(_kernels.Engine(2, isa), experts)
    ids, weights = ref.routing(rng, tokens, 3, len(experts), missing=0.2)
    x = ref.bf16_matrix(rng, tokens, 136)
    expected, bound = ref.layer(experts, x, ids, weights)
    ref.within(ref.forward(native, x, ids, weights), expected, bound)


@pytest.mark.parametrize("name", ref.FORMATS)
def test_long_rows_in_blocks(isa: str, name: str) -> None:
    """M x K beyond 1 MiB of activations: K is walked in blocks, the last of them short."""
    rng = np.random.default_rng(3)
    expert = ref.random_expert(rng, 2400, 40, name)
    native = ref.make_layer(_kernels.Engine(2, isa), [expert])
    x = ref.bf16_matrix(rng, 515, 2400)
    ids, weights = one_expert(515)
    expected, bound = ref.layer([expert], x, ids, weights, rounds_hidden=uses_matrix_unit(isa))
    ref.within(ref.forward(native, x, ids, weights), expected, bound)
    ref.within(ref.forward(native, ref.to_bf16(x), ids, weights), expected, bound)


def packed(
    engine: _kernels.Engine, w: ref.Array, name: str
) -> tuple[_kernels.PackedLinear, ref.Array, ref.Array]:
    """A packed matrix, its weights as integers (bf16: as they are) in float64, and its row scales."""
    if name == "bf16":
        return _kernels.PackedLinear.from_bf16(engine, ref.to_bf16(w)), w.astype(np.float64), np.ones(len(w))
    integers, row_scale = ref.integer_weights(w, name)
    if name == "int8":
        linear = _kernels.PackedLinear.from_int8(engine, integers.astype(np.int8), row_scale)
    else:
        group = int(name.removeprefix("int4_g"))
        q, s, z, scale = _kernels.quantize_int4(w, group)
        linear = _kernels.PackedLinear.from_int4(engine, q, s, z, scale, w.shape[1], group)
    return linear, integers.astype(np.float64), row_scale


def linear_oracle(w: ref.Array, scale: ref.Array, x: ref.Array, name: str) -> tuple[ref.Array, ref.Array]:
    """(x W^T, bound): K u sum |x w| for floats, three roundings of an exact integer otherwise."""
    if name == "bf16":
        wide = x.astype(np.float64)
        return wide @ w.T, (w.shape[1] + 1) * ref.U * (np.abs(wide) @ np.abs(w).T)
    xq, x_scale = ref.int8_rows(x)
    exact = (xq @ w.T) * np.outer(x_scale.astype(np.float64), scale)
    return exact, 4 * ref.U * np.abs(exact)


def check_linear(engine: _kernels.Engine, name: str, n: int, k: int, rows: list[int]) -> None:
    rng = np.random.default_rng(n * 1000 + k)
    linear, w, scale = packed(engine, ref.bf16_matrix(rng, n, k, scale=k**-0.5), name)
    assert (linear.out_features, linear.in_features) == (n, k)
    for m in rows:
        x = ref.bf16_matrix(rng, m, k)
        expected, bound = linear_oracle(w, scale, x, name)
        for given in (x, ref.to_bf16(x)):
            out = np.full((m, n), np.nan, dtype=np.float32)
            linear.forward(given, out)
            ref.within(out, expected, bound, f"{name} {m}x{n}x{k} {given.dtype}")
            half = np.full((m, n), 0xFFFF, dtype=np.uint16)
            linear.forward(given, half)
            ref.within(
                ref.from_bf16(half), expected, bound + ref.U_BF16 * (np.abs(expected) + bound), "bf16 output"
            )


@pytest.mark.parametrize("name", ref.FORMATS)
def test_linear_sizes(isa: str, name: str) -> None:
    engine = _kernels.Engine(2, isa)
    for n in N_SIZES:
        check_linear(engine, name, n, 100, [1, 3, 9])
    for k in K_SIZES:
        check_linear(engine, name, 33, k, [1, 2, 3, 4, 5, 8, 17, 33])


@pytest.mark.parametrize("name", ref.FORMATS)
def test_linear_rows(isa: str, name: str) -> None:
    engine = _kernels.Engine(2, isa)
    check_linear(engine, name, 40, 130, ROWS)
    check_linear(engine, name, 70, 2400, [512, 520])  # K in blocks


@pytest.mark.parametrize("name", ref.FORMATS)
def test_weights_in_streams(isa: str, name: str) -> None:
    """More than two row tiles read a strip in as many streams as divide its k-steps, at most eight."""
    engine = _kernels.Engine(2, isa)
    for k_steps in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 15, 16, 20, 22, 24, 36):
        check_linear(engine, name, 40, k_steps * 64 - 3, [33, 49, 70, 150])


@pytest.mark.parametrize("name", ref.EXACT)
def test_integer_tables_agree_to_the_bit(name: str) -> None:
    """int8 and int4 dot products are exact and their scaling is the same two roundings in every table."""
    rng = np.random.default_rng(5)
    w, x = ref.bf16_matrix(rng, 70, 200), ref.bf16_matrix(rng, 39, 200)
    outputs = {}
    for isa in _kernels.available_isas():
        linear = packed(_kernels.Engine(1, isa), w, name)[0]
        outputs[isa] = np.empty((39, 70), dtype=np.float32)
        linear.forward(x, outputs[isa])
    for isa, out in outputs.items():
        assert np.array_equal(out, outputs["scalar"]), isa


@pytest.mark.parametrize("name", ref.EXACT)
def test_integer_extremes(isa: str, name: str) -> None:
    """Activations all at +-127 with weights at both ends of int8: sums that saturate 16 bits would show."""
    engine = _kernels.Engine(1, isa)
    k, n = 512, 32
    signs = np.where(np.arange(k) % 3 == 0, 1.0, -1.0).astype(np.float32)
    w = np.stack([signs * (1 if row % 2 else -1) for row in range(n)]).astype(np.float32)
    w[0], w[1] = 1.0, -1.0
    linear, integers, scale = packed(engine, w, name)
    for m in (1, 2, 5, 33):
        x = np.stack([signs, -signs, np.ones(k), -np.ones(k)] * 9)[:m].astype(np.float32)
        expected, bound = linear_oracle(integers, scale, x, name)
        out = np.empty((m, n), dtype=np.float32)
        linear.forward(x, out)
        ref.within(out, expected, bound)


def test_int4_uses_the_whole_of_int8(isa: str) -> None:
    """Every legal (s, z) at both ends, q 0 and 15: -128 and 127 come out right."""
    engine = _kernels.Engine(1, isa)
    pairs = [(s, z) for s in range(1, 17) for z in range(max(0, 15 * s - 127), 129)]
    n, k = len(pairs), 64
    s = np.array([[p[0]] for p in pairs], dtype=np.uint8)
    z = np.array([[p[1]] for p in pairs], dtype=np.uint8)
    q = np.random.default_rng(6).integers(0, 256, (n, k // 2)).astype(np.uint8)
    q[:, 0], q[:, -1] = 0xF0, 0x0F
    scale = np.ones(n, dtype=np.float32)
    integers, _ = ref.int4_weights((q, s, z, scale), k, 64)
    assert (integers.min(), integers.max()) == (-128, 127)
    linear = _kernels.PackedLinear.from_int4(engine, q, s, z, scale, k, 64)
    for m in (1, 2, 4, 7):
        x = np.random.default_rng(m).integers(-127, 128, (m, k)).astype(np.float32)
        x[:, 0] = 127  # so that the scale is one and codes are the values
        out = np.empty((m, n), dtype=np.float32)
        linear.forward(x, out)
        assert np.array_equal(out, (x @ integers.T).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "limit"), [("int8", 0.03), ("int4_g32", 0.14), ("int4_g64", 0.16), ("int4_g128", 0.18)]
)
def test_error_of_a_format(name: str, limit: float) -> None:
    """Relative L2 error of a layer, Gaussian weights and activations, against float64 on unquantised weights.

    int8: a step of max/127 with max near 3.3 sigma is 0.75 % of sigma rms for each of the three matrices and
    for x, more for the hidden row, whose tails are longer. int4: 7.3 % (groups of 32), 8.4 % (64) or 9.3 %
    (128) for each of the three matrices.
    """
    rng = np.random.default_rng(7)
    expert = ref.random_expert(rng, 512, 256, name)
    native = ref.make_layer(_kernels.Engine(2), [expert])
    x = ref.bf16_matrix(rng, 64, 512)
    ids, weights = one_expert(64)
    plain = ref.Expert(expert.gate, expert.up, expert.down, "bf16")
    expected, _ = ref.layer([plain], x, ids, weights)
    error = np.linalg.norm(ref.forward(native, x, ids, weights) - expected) / np.linalg.norm(expected)
    assert limit / 4 < error <= limit


def test_linear_bytes() -> None:
    """nbytes is what the strips hold: 32 rows per strip, 64-byte k-steps, a scale per row."""
    engine = _kernels.Engine(1)
    w = np.ones((33, 65), dtype=np.float32)
    assert packed(engine, w, "bf16")[0].nbytes == 2 * 3 * 2048
    assert packed(engine, w, "int8")[0].nbytes == 2 * 2 * 2048 + 2 * 128
    assert packed(engine, w, "int4_g32")[0].nbytes == 2 * 2 * (1024 + 128) + 2 * 128
    assert packed(engine, w, "int4_g64")[0].nbytes == 2 * 2 * (1024 + 64) + 2 * 128
    assert packed(engine, w, "int4_g128")[0].nbytes == 2 * (2048 + 64) + 2 * 128


def test_no_rows() -> None:
    expert = ref.random_expert(np.random.default_rng(8), 64, 32, "int8")
    native = ref.make_layer(_kernels.Engine(1), [expert])
    ids, weights = np.zeros((0, 2), dtype=np.int64), np.zeros((0, 2), dtype=np.float32)
    assert ref.forward(native, np.zeros((0, 64), dtype=np.float32), ids, weights).shape == (0, 64)


# Planted errors: the oracle and its bounds must see the smallest mistake a kernel can make.


def planted(name: str) -> tuple[ref.Array, ref.Array, ref.Array]:
    rng = np.random.default_rng(9)
    expert = ref.random_expert(rng, 320, 96, name)
    x = ref.bf16_matrix(rng, 8, 320)
    ids, weights = one_expert(8)
    return ref.forward(ref.make_layer(_kernels.Engine(1), [expert]), x, ids, weights), *ref.layer(
        [expert], x, ids, weights
    )


@pytest.mark.parametrize("name", ref.FORMATS)
@pytest.mark.parametrize("flaw", ["sign", "nan", "one element", "one int8 step", "shape"])
def test_bounds_see(name: str, flaw: str) -> None:
    got, expected, bound = planted(name)
    ref.within(got, expected, bound)
    if flaw == "sign":
        got = -got
    elif flaw == "nan":
        got[3, 5] = np.nan
    elif flaw == "one element":
        got[7, 319] *= np.float32(1.01)
    elif flaw == "one int8 step":
        got = got * np.float32(1 + 1 / 127)
    else:
        got = got[:, :-1]
    with pytest.raises(AssertionError):
        ref.within(got, expected, bound)


@pytest.mark.parametrize("name", ref.FORMATS)
def test_bounds_see_a_wrong_weight(name: str) -> None:
    """One wrong weight in one matrix moves the result out of its bounds."""
    rng = np.random.default_rng(10)
    expert = ref.random_expert(rng, 72, 40, name)
    x = ref.bf16_matrix(rng, 4, 72)
    ids, weights = one_expert(4)
    for matrix, place in ((expert.gate, (39, 71)), (expert.up, (0, 0)), (expert.down, (71, 39))):
        kept = matrix[place]
        matrix[place] += 1.0
        got = ref.forward(ref.make_layer(_kernels.Engine(1), [expert]), x, ids, weights)
        matrix[place] = kept
        with pytest.raises(AssertionError):
            ref.within(got, *ref.layer([expert], x, ids, weights))
