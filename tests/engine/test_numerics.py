"""NaN and infinities in activations reach their own tokens and no other; extreme activations stay right."""

import numpy as np
import pytest

from kttools_runtime import _kernels
from tests.engine import reference as ref

HIDDEN, INNER, EXPERTS = 96, 48, 4


@pytest.mark.parametrize("tokens", [1, 2, 4, 19, 70])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ref.FORMATS)
def test_layer_keeps_them_in_their_token(isa: str, name: str, value: float, tokens: int) -> None:
    rng = np.random.default_rng(61)
    experts = [ref.random_expert(rng, HIDDEN, INNER, name) for _ in range(EXPERTS)]
    native = ref.make_layer(_kernels.Engine(2, isa), experts)
    ids, weights = ref.routing(rng, tokens, 2, EXPERTS)
    x = ref.bf16_matrix(rng, tokens, HIDDEN)
    bad = np.zeros(tokens, dtype=bool)
    bad[:: max(1, tokens // 3)] = True
    for dtype in ("float32", "bf16"):
        given = x.copy() if dtype == "float32" else ref.to_bf16(x)
        clean = ref.forward(native, given, ids, weights)
        poison = np.float32(value) if dtype == "float32" else np.float32(value).view(np.uint32) >> 16
        given[bad, HIDDEN - 1] = poison
        got = ref.forward(native, given, ids, weights)
        assert np.array_equal(got[~bad], clean[~bad])
        assert not np.isfinite(got[bad]).any()


@pytest.mark.parametrize("rows", [1, 2, 3, 18])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["bf16", "int8", "int4_g64"])
def test_linear_keeps_them_in_their_row(isa: str, name: str, value: float, rows: int) -> None:
    rng = np.random.default_rng(62)
    engine = _kernels.Engine(1, isa)
    w = ref.bf16_matrix(rng, 40, 70)
    if name == "bf16":
        linear = _kernels.PackedLinear.from_bf16(engine, ref.to_bf16(w))
    elif name == "int8":
        linear = _kernels.PackedLinear.from_int8(engine, *_kernels.quantize_int8(w))
    else:
        q, s, z, scale = _kernels.quantize_int4(w, 64)
        linear = _kernels.PackedLinear.from_int4(engine, q, s, z, scale, 70, 64)
    x = ref.bf16_matrix(rng, rows, 70)
    clean, got = np.empty((rows, 40), dtype=np.float32), np.empty((rows, 40), dtype=np.float32)
    half = np.empty((rows, 40), dtype=np.uint16)
    linear.forward(x, clean)
    x[rows - 1, 69] = value
    linear.forward(x, got)
    linear.forward(x, half)
    assert np.array_equal(got[:-1], clean[:-1])
    assert not np.isfinite(got[-1]).any()
    assert not np.isfinite(ref.from_bf16(half)[-1]).any()


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-31, 1e-20, 1e-6, 1e6])
@pytest.mark.parametrize("name", ref.FORMATS)
def test_activations_of_every_size(isa: str, name: str, size: float) -> None:
    """Large gates saturate silu, small ones make it linear; integer formats take rows below 1e-30 as zero."""
    rng = np.random.default_rng(63)
    expert = ref.random_expert(rng, HIDDEN, INNER, name)
    native = ref.make_layer(_kernels.Engine(1, isa), [expert])
    for tokens in (1, 2, 5):
        x = (ref.bf16_matrix(rng, tokens, HIDDEN).astype(np.float64) * size).astype(np.float32)
        ids, weights = np.zeros((tokens, 1), dtype=np.int64), np.ones((tokens, 1), dtype=np.float32)
        got = ref.forward(native, x, ids, weights)
        expected, bound = ref.layer([expert], x, ids, weights)
        ref.within(got, expected, bound + 1e-37)  # beneath that float32 is denormal


def test_silu_far_out(isa: str) -> None:
    """Gates of +-50 to +-1000: silu is x or zero there, never NaN or inf."""
    gates = np.array(
        [-1000, -200, -104, -89, -88, -87, -50, 50, 87, 88, 89, 104, 200, 1000, 0, 1], np.float32
    )
    gate = ref.from_bf16(ref.to_bf16(gates[:, None] * np.eye(1, 32, dtype=np.float32)))
    up = np.repeat(np.eye(1, 32, dtype=np.float32), 16, axis=0)
    down = np.zeros((32, 16), dtype=np.float32)
    down[:16] = np.eye(16, dtype=np.float32)
    expert = ref.Expert(gate, up, down, "bf16")
    native = ref.make_layer(_kernels.Engine(1, isa), [expert])
    x = np.eye(1, 32, dtype=np.float32)
    got = ref.forward(native, x, np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=np.float32))[0, :16]
    # silu(-50) is -9.6e-21, silu(-87) -1.4e-36; below exp's range the kernels stop near 1e-36
    ref.within(got, ref.silu(gates.astype(np.float64)), np.abs(gates) * 8 * ref.U * (gates > -50) + 1e-20)
