"""Dense matrices in GGUF's blocks: the gguf package's numbers, for every table, any rows and any threads."""

import numpy as np
import pytest

from kttools_runtime import _kernels
from tests.engine import ggml_blocks as blocks
from tests.engine import reference as ref

# Outputs that do not fill strips; inputs that fill blocks of 256, of Q8_0 alone not steps of 64 either.
SIZES = {"q4_k": (70, 768), "q5_k": (33, 512), "q6_k": (100, 768), "q8_0": (65, 352)}
KINDS = tuple(SIZES)
FEW_ROWS = (1, 2, 3, 4)
MANY_ROWS = (9, 33)


def rows_of(kind: str, seed: int = 1) -> ref.Array:
    return blocks.random_rows(np.random.default_rng(seed), kind, *SIZES[kind])


def linear(kind: str, rows: ref.Array, isa: str, threads: int = 2) -> _kernels.PackedLinear:
    return _kernels.PackedLinear.from_blocks(_kernels.Engine(threads, isa), kind, rows, SIZES[kind][1])


def product(matrix: _kernels.PackedLinear, x: ref.Array) -> ref.Array:
    out = np.full((len(x), matrix.out_features), np.nan, dtype=np.float32)
    matrix.forward(x, out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_the_files(isa: str, kind: str) -> None:
    """Unit vectors read the matrix out, column by column: 127 steps of 1/127 times each weight."""
    rows = rows_of(kind)
    expected = blocks.weights(kind, rows)
    matrix = linear(kind, rows, isa)
    columns = np.concatenate([product(matrix, x) for x in np.eye(SIZES[kind][1], dtype=np.float32)[:, None]])
    # Codes times scale less the minimum: two products and their difference are rounded, then 127 * (1/127).
    bound = 4 * ref.U * np.abs(expected).max(axis=1, keepdims=True) * 2
    ref.within(columns.T.astype(np.float64), expected.astype(np.float64), bound)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", FEW_ROWS)
def test_few_rows(isa: str, kind: str, count: int) -> None:
    rows, rng = rows_of(kind), np.random.default_rng(2)
    x = ref.bf16_matrix(rng, count, SIZES[kind][1])
    x[:, 256:] *= 4  # a block's activations have a scale of their own
    w = blocks.weights(kind, rows).astype(np.float64)
    q, step = blocks.block_codes(x)
    got = product(linear(kind, rows, isa), x)
    ref.within(got, (q * step) @ w.T, blocks.sum_error(q * step, w, kind))
    assert np.array_equal(got, product(linear(kind, rows, isa), ref.to_bf16(x)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", MANY_ROWS)
def test_many_rows(isa: str, kind: str, count: int) -> None:
    """Without tiles as few rows; with them no further from the blocks' numbers than int8 of them is."""
    rows, rng = rows_of(kind), np.random.default_rng(3)
    x = ref.bf16_matrix(rng, count, SIZES[kind][1])
    w = blocks.weights(kind, rows)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    got = product(linear(kind, rows, isa), x)
    error = np.linalg.norm(got - exact)
    if isa == "amx":
        int8 = _kernels.PackedLinear.from_int8(_kernels.Engine(1, isa), *_kernels.quantize_int8(w))
        assert error <= 1.1 * np.linalg.norm(product(int8, x) - exact)
    else:
        q, step = blocks.block_codes(x)
        wide = w.astype(np.float64)
        ref.within(got, (q * step) @ wide.T, blocks.sum_error(q * step, wide, kind))
    assert 0.001 < error / np.linalg.norm(exact) <= 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("inputs", "count"), [(4352, 300), (4096, 300), (2048, 150)], ids=["one stream", "four", "two"]
)
def test_more_rows_than_the_caches_hold(isa: str, kind: str, inputs: int, count: int) -> None:
    """K goes by in blocks then (csrc/gemm.cpp), no unit of ggml is cut, a row is on its own."""
    rng = np.random.default_rng(8)
    rows = blocks.random_rows(rng, kind, 40, inputs)
    matrix = _kernels.PackedLinear.from_blocks(_kernels.Engine(2, isa), kind, rows, inputs)
    x = ref.bf16_matrix(rng, count, inputs)
    together = product(matrix, x)
    in_parts = np.concatenate([product(matrix, x[start : start + 20]) for start in range(0, count, 20)])
    assert np.isfinite(together).all()
    assert np.array_equal(together, in_parts)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_agree_bit_for_bit(kind: str) -> None:
    rows = rows_of(kind)
    x = ref.bf16_matrix(np.random.default_rng(4), 4, SIZES[kind][1])
    outs = [product(linear(kind, rows, isa), x) for isa in _kernels.available_isas()]
    assert all(np.array_equal(out, outs[0]) for out in outs[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 70])
def test_same_bits_for_any_number_of_threads(isa: str, kind: str, count: int) -> None:
    rows = rows_of(kind)
    x = ref.bf16_matrix(np.random.default_rng(5), count, SIZES[kind][1])
    outs = [product(linear(kind, rows, isa, threads), x) for threads in (1, 2, 3)]
    assert np.isfinite(outs[0]).all()
    assert all(np.array_equal(out, outs[0]) for out in outs[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_size(kind: str) -> None:
    """At DeepSeek-V3's dimensions ggml's bytes and a float a row."""
    data = np.zeros((1536, 7168 // blocks.KINDS[kind][1] * blocks.KINDS[kind][2]), dtype=np.uint8)
    matrix = _kernels.PackedLinear.from_blocks(_kernels.Engine(1), kind, data, 7168)
    assert matrix.nbytes == data.nbytes + 4 * 1536


def test_nan_rows_and_rows_of_zeros(isa: str) -> None:
    matrix = linear("q4_k", rows_of("q4_k"), isa)
    for count in (2, 9):
        x = ref.bf16_matrix(np.random.default_rng(7), count, 768)
        x[0], x[1, 300] = 0, np.nan
        out = product(matrix, x)
        assert not out[0].any()
        assert np.isnan(out[1]).all()
        assert np.isfinite(out[2:]).all()


@pytest.mark.parametrize(("kind", "at"), [("q4_k", 0), ("q4_k", 2), ("q5_k", 2), ("q6_k", 208), ("q8_0", 0)])
def test_scales_that_are_not_finite_are_refused(kind: str, at: int) -> None:
    rows = rows_of(kind)
    rows[5, at : at + 2] = np.array([np.nan], dtype="<f2").view(np.uint8)
    with pytest.raises(ValueError, match="row 5, column 0 is not a finite number"):
        linear(kind, rows, "scalar")


def test_arguments_are_checked() -> None:
    engine, make = _kernels.Engine(1), _kernels.PackedLinear.from_blocks
    rows = rows_of("q4_k")
    for name, data, inputs, message in (
        ("q4_k_q6_k", rows, 768, "is a pair of formats"),
        ("int8", rows, 768, "int8 is no block format"),
        ("q4_k", rows, 700, "q4_k holds blocks of 256 inputs; 700 do not fill them"),
        ("q4_k", rows, 512, "blocks has shape"),
        ("q4_k", rows[:, :-1].copy(), 768, "blocks has shape"),
        ("q4_k", rows[:0], 768, "N must be 1 to"),
        ("q4_k", rows, 0, "K must be 1 to"),
        ("q6_k", rows, 768, "blocks has shape"),
        ("q4_k", rows.reshape(-1), 768, "must have 2 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            make(engine, name, data, inputs)
