"""The same bits from run to run, for any number of threads, across the borders of segments and chunks."""

import numpy as np
import pytest

from kttools_runtime import _kernels
from tests.engine import reference as ref

THREADS = [1, 2, 3, 5, 7]
# An expert's rows are cut at 640 and tokens at 4096. One token hits 8 experts of 92 KB: work for 7 threads.
TOKENS = [1, 3, 33, 64, 513, 640, 641]
LONG = [4096, 4097]


def outputs(
    isa: str, experts: list[ref.Expert], x: ref.Array, ids: ref.Array, weights: ref.Array
) -> dict[int, ref.Array]:
    results = {}
    for threads in THREADS:
        layer = ref.make_layer(_kernels.Engine(threads, isa), experts)
        results[threads] = ref.forward(layer, x, ids, weights)
        assert np.array_equal(ref.forward(layer, x, ids, weights), results[threads])
    return results


def check_threads(isa: str, experts: list[ref.Expert], tokens: int, k: int) -> None:
    rng = np.random.default_rng(tokens)
    ids, weights = ref.routing(rng, tokens, k, len(experts), missing=0.05)
    x = ref.bf16_matrix(rng, tokens, experts[0].hidden_size)
    for given in (x, ref.to_bf16(x)) if tokens < 4096 else (ref.to_bf16(x),):
        results = outputs(isa, experts, given, ids, weights)
        for threads, out in results.items():
            assert np.array_equal(out, results[1]), f"{threads} threads, {tokens} tokens, {given.dtype}"
    assert np.isfinite(results[1]).all()
    assert results[1].any()


@pytest.mark.parametrize("name", ref.FORMATS)
def test_threads(isa: str, name: str) -> None:
    rng = np.random.default_rng(31)
    experts = [ref.random_expert(rng, 320, 96, name) for _ in range(8)]
    for tokens in TOKENS if isa != "scalar" else TOKENS[:3]:
        check_threads(isa, experts, tokens, 8 if tokens < 64 else 2)


@pytest.mark.parametrize("name", ref.FORMATS)
def test_threads_over_chunks(isa: str, name: str) -> None:
    rng = np.random.default_rng(32)
    experts = [ref.random_expert(rng, 24, 8, name) for _ in range(4)]
    for tokens in LONG:
        check_threads(isa, experts, tokens, 1)


@pytest.mark.parametrize("name", ref.FORMATS)
def test_chunk_borders_against_the_oracle(isa: str, name: str) -> None:
    """Each token of 4700 lands in its own row, in either chunk."""
    rng = np.random.default_rng(33)
    experts = [ref.random_expert(rng, 40, 24, name) for _ in range(3)]
    x = ref.bf16_matrix(rng, 4700, 40)
    ids, weights = ref.routing(rng, 4700, 2, 3)
    native = ref.make_layer(_kernels.Engine(3, isa), experts)
    ref.within(ref.forward(native, x, ids, weights), *ref.layer(experts, x, ids, weights))


@pytest.mark.parametrize("name", ref.FORMATS)
def test_linear_threads(isa: str, name: str) -> None:
    rng = np.random.default_rng(34)
    w = ref.bf16_matrix(rng, 700, 520)
    for rows in (1, 2, 33, 513) if isa != "scalar" else (1, 7):
        x = ref.to_bf16(ref.bf16_matrix(rng, rows, 520))
        results = []
        for threads in THREADS:
            engine = _kernels.Engine(threads, isa)
            if name == "bf16":
                linear = _kernels.PackedLinear.from_bf16(engine, ref.to_bf16(w))
            elif name == "int8":
                linear = _kernels.PackedLinear.from_int8(engine, *_kernels.quantize_int8(w))
            else:
                group = int(name.removeprefix("int4_g"))
                q, s, z, scale = _kernels.quantize_int4(w, group)
                linear = _kernels.PackedLinear.from_int4(engine, q, s, z, scale, 520, group)
            out = np.empty((rows, 700), dtype=np.float32)
            linear.forward(x, out)
            results.append(out)
        assert all(np.array_equal(out, results[0]) for out in results)
