"""GGUF's blocks in packs: the same bits there and back, and every kernel against float64."""

import numpy as np
import pytest

from kttools_runtime import _kernels
from tests.engine import ggml_blocks as blocks
from tests.engine import reference as ref

# Tiles take over at 8 rows (csrc/rows.cpp); both ways of one expert are swept through remainders.
VECTOR_ROWS = (1, 2, 3, 7)
TILED_ROWS = (8, 33)
COMPUTED = ("q4_k", "q5_k", "q6_k", "q8_0", "q4_k_q6_k", "q8_0_q4_k")
SIZES = {"q4_k": (512, 256), "q5_k": (256, 512), "q6_k": (768, 256), "q8_0": (352, 96)}


def sizes_of(name: str) -> tuple[int, int]:
    """hidden_size, moe_intermediate_size that fill the blocks: Q8_0's alone may have any multiple of 32."""
    into, out = blocks.parts(name)
    return SIZES[into][0], SIZES[out][1] if out != "q8_0" else 96


def one_expert(tokens: int) -> tuple[ref.Array, ref.Array]:
    return np.zeros((tokens, 1), dtype=np.int64), np.full((tokens, 1), 0.75, dtype=np.float32)


@pytest.mark.parametrize("name", blocks.FORMATS)
def test_bits_survive(name: str) -> None:
    """Re-tiled and turned back: ggml's own bytes; dequantised: the gguf package's floats, bit for bit."""
    e = blocks.random_expert(np.random.default_rng(1), *sizes_of(name), name)
    blob = e.blob()
    sizes = e.hidden_size, e.moe_intermediate_size
    for back, matrix in zip(
        _kernels.unpack_ggml_expert(name, *sizes, blob), (e.gate, e.up, e.down), strict=True
    ):
        assert np.array_equal(back, matrix.reshape(-1))
    for got, expected in zip(_kernels.unpack_expert(name, blob, *sizes), e.floats(), strict=True):
        assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", blocks.FORMATS)
def test_size(name: str) -> None:
    """At DeepSeek-V3's dimensions a pack is at most 1.002 times ggml's blocks."""
    into, out = blocks.parts(name)

    def size(kind: str) -> float:
        _, inputs, count, _ = blocks.KINDS[kind]
        return 7168 * 2048 / inputs * count

    assert _kernels.expert_bytes(name, 7168, 2048) <= 1.002 * (2 * size(into) + size(out))


@pytest.mark.parametrize("name", COMPUTED)
def test_few_rows(isa: str, name: str) -> None:
    rng = np.random.default_rng(2)
    e = blocks.random_expert(rng, *sizes_of(name), name)
    layer = blocks.make_layer(_kernels.Engine(2, isa), [e])
    for rows in VECTOR_ROWS:
        x = ref.bf16_matrix(rng, rows, e.hidden_size)
        x[:, 256:] *= 4  # a block's activations have a scale of their own
        ids, weights = one_expert(rows)
        got = ref.forward(layer, x, ids, weights)
        expected, bound = blocks.expert(e, x)
        ref.within(got, expected * 0.75, bound * 0.75 + 4 * ref.U * np.abs(expected))
        assert np.array_equal(got, ref.forward(layer, ref.to_bf16(x), ids, weights))


@pytest.mark.parametrize("name", COMPUTED)
def test_many_rows(isa: str, name: str) -> None:
    """Tables without tiles: the same arithmetic as few rows. With tiles: 8 bits of the row's range.

    Half a step of 1/127 of the largest weight, and the same for every activation row: as far from the blocks'
    own numbers as int8 of the same weights is.
    """
    rng = np.random.default_rng(3)
    e = blocks.random_expert(rng, *sizes_of(name), name)
    layer = blocks.make_layer(_kernels.Engine(2, isa), [e])
    gate, up, down = (w.astype(np.float64) for w in e.floats())
    for rows in TILED_ROWS:
        x = ref.bf16_matrix(rng, rows, e.hidden_size)
        ids, weights = one_expert(rows)
        got = ref.forward(layer, x, ids, weights)
        exact = 0.75 * (ref.silu(x @ gate.T) * (x @ up.T)) @ down.T
        error = np.linalg.norm(got - exact)
        if isa == "amx":
            twin = ref.layer([ref.Expert(*e.floats(), "int8")], x, ids, weights)[0]
            assert error <= 1.1 * np.linalg.norm(twin - exact)
        else:
            expected, bound = blocks.expert(e, x)
            ref.within(got, expected * 0.75, bound * 0.75 + 4 * ref.U * np.abs(expected))
        assert 0.001 < error / np.linalg.norm(exact) <= 0.035


def test_tables_agree_bit_for_bit() -> None:
    """Integers are exact and floats are added in one order. A gate far above one makes silu the identity."""
    rng = np.random.default_rng(4)
    for name in ("q4_k", "q5_k", "q6_k", "q8_0"):
        e = blocks.random_expert(rng, *sizes_of(name), name)
        x = np.abs(ref.bf16_matrix(rng, 5, e.hidden_size)) * 16
        for at, _ in blocks.KINDS[name][3][1:]:  # no minimums, and codes that are all positive
            e.gate.reshape(len(e.gate), -1, blocks.KINDS[name][2])[:, :, at : at + 2] = 0
        ids, weights = one_expert(5)
        outs = [
            ref.forward(blocks.make_layer(_kernels.Engine(1, isa), [e]), x, ids, weights)
            for isa in _kernels.available_isas()
        ]
        same = [np.mean(out == outs[0]) for out in outs[1:]]
        assert min(same) == 1 or name in ("q6_k", "q8_0"), same


@pytest.mark.parametrize("name", ["q4_k", "q4_k_q6_k", "q8_0"])
def test_same_bits_for_any_number_of_threads(isa: str, name: str) -> None:
    rng = np.random.default_rng(5)
    experts = [blocks.random_expert(rng, *sizes_of(name), name) for _ in range(3)]
    x = ref.bf16_matrix(rng, 21, experts[0].hidden_size)
    ids, weights = ref.routing(rng, 21, 2, 3, missing=0.2)
    x[(ids < 0).all(axis=1)] = np.nan  # rows of nobody are not read
    outs = []
    for threads, numa, nodes in (
        (1, "off", 0),
        (2, "off", 0),
        (3, "off", 0),
        (3, "shard", 3),
        (2, "replicate", 2),
    ):
        layer = blocks.make_layer(_kernels.Engine(threads, isa, numa, nodes), experts)
        outs += [ref.forward(layer, x, ids, weights) for _ in range(2)]
    assert np.isfinite(outs[0]).all()
    for out in outs[1:]:
        assert np.array_equal(out, outs[0])


def test_formats_of_experts_may_differ(isa: str) -> None:
    """q4_k beside q4_k_q6_k, int8 and bf16 in one layer: each gives what it gives alone."""
    rng = np.random.default_rng(6)
    names = ("q4_k", "q4_k_q6_k", "q6_k_q8_0")
    ours = [blocks.random_expert(rng, 256, 256, name) for name in names]
    others = [ref.random_expert(rng, 256, 256, name) for name in ("int8", "bf16")]
    formats, blobs = [e.format for e in [*ours, *others]], [e.blob() for e in [*ours, *others]]
    engine = _kernels.Engine(2, isa)
    mixed = _kernels.ExpertLayer(engine, 256, 256, formats, blobs)
    x = ref.bf16_matrix(rng, 4, 256)
    _, weights = one_expert(4)
    for index, (name, blob) in enumerate(zip(formats, blobs, strict=True)):
        ids = np.full((4, 1), index, dtype=np.int64)
        alone = _kernels.ExpertLayer(engine, 256, 256, [name], [blob])
        expected = ref.forward(alone, x, np.zeros_like(ids), weights)
        assert np.array_equal(ref.forward(mixed, x, ids, weights), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_come_out_as_nan(isa: str, bad: float) -> None:
    rng = np.random.default_rng(7)
    e = blocks.random_expert(rng, 512, 256, "q4_k")
    for rows in (2, 9):
        x = ref.bf16_matrix(rng, rows, 512)
        x[1, 300] = bad
        out = ref.forward(blocks.make_layer(_kernels.Engine(1, isa), [e]), x, *one_expert(rows))
        assert np.isnan(out[1]).all()
        assert np.isfinite(np.delete(out, 1, axis=0)).all()


def test_rows_of_zeros(isa: str) -> None:
    """Blocks whose scales are zero, and activations that are."""
    rng = np.random.default_rng(8)
    e = blocks.random_expert(rng, 256, 256, "q6_k")
    e.gate[:] = 0
    for rows in (1, 8):
        layer = blocks.make_layer(_kernels.Engine(1, isa), [e])
        assert not ref.forward(layer, ref.bf16_matrix(rng, rows, 256), *one_expert(rows)).any()
        assert not ref.forward(layer, np.zeros((rows, 256), np.float32), *one_expert(rows)).any()


@pytest.mark.parametrize(("name", "at"), [("q4_k", 0), ("q4_k", 2), ("q5_k", 2), ("q6_k", 208), ("q8_0", 0)])
def test_scales_that_are_not_finite_are_refused(name: str, at: int) -> None:
    e = blocks.random_expert(np.random.default_rng(9), *sizes_of(name), name)
    e.up[3, at : at + 2] = np.array([np.inf], dtype="<f2").view(np.uint8)
    with pytest.raises(ValueError, match="row 3, column 0 is not a finite number"):
        e.blob()


@pytest.mark.parametrize(("name", "size"), [("q4_k", (300, 256)), ("q6_k", (256, 128)), ("q8_0", (64, 40))])
def test_sizes_that_leave_blocks_unfilled_are_refused(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not fill them"):
        _kernels.expert_bytes(name, *size)


def test_arguments_are_checked() -> None:
    e = blocks.random_expert(np.random.default_rng(10), 256, 256, "q4_k")
    blob = e.blob()
    gate, up, down = (m.reshape(-1) for m in (e.gate, e.up, e.down))
    with pytest.raises(ValueError, match="int8 is no block format"):
        _kernels.pack_ggml_expert("int8", 256, 256, gate, up, down, blob)
    with pytest.raises(ValueError, match="down has shape"):
        _kernels.pack_ggml_expert("q4_k_q6_k", 256, 256, gate, up, down, blob)
    with pytest.raises(ValueError, match="blob has shape"):
        _kernels.unpack_ggml_expert("q4_k", 256, 512, blob)
    with pytest.raises(ValueError, match="unknown format 'q4_k'"):
        _kernels.pack_expert("q4_k", *(np.zeros((256, 256), np.float32),) * 3, blob)


@pytest.mark.parametrize("flaw", ["code", "scale", "min", "d"])
def test_bounds_see_a_wrong_block(flaw: str) -> None:
    """One changed code, integer scale or float16 scale of one block leaves the bounds."""
    rng = np.random.default_rng(11)
    e = blocks.random_expert(rng, 256, 256, "q4_k")
    x = ref.bf16_matrix(rng, 3, 256)
    ids, weights = one_expert(3)
    expected, bound = blocks.expert(e, x)
    at, bit = {"code": (20, 3), "scale": (4, 1), "min": (8, 1), "d": (0, 5)}[flaw]
    e.down[7, at] ^= 1 << bit
    got = ref.forward(blocks.make_layer(_kernels.Engine(1), [e]), x, ids, weights)
    with pytest.raises(AssertionError):
        ref.within(got, expected * 0.75, bound * 0.75 + 4 * ref.U * np.abs(expected))
