"""Experts with biases and a clamped gate: every kernel table and format, against NumPy in float64.

The weights of the oracle are those the blob stands for, so that only activations are rounded: to int8 twice
(1 / 254 of a row's largest value), to bf16 by the matrix unit, or not at all (bf16 weights on floats).
"""

from typing import Any

import numpy as np
import pytest

from kttools_runtime import _kernels
from tests.engine import reference as ref

HIDDEN, INNER, EXPERTS = 104, 57, 5  # neither whole strips nor whole steps
OPENAI = (1.702, 0.8, 1.0)  # a limit that a third of these gates reaches
SILU = (1.0, np.inf, 0.0)


def forward(
    parts: tuple[ref.Array, ...],
    biases: tuple[ref.Array, ...],
    gate: tuple[float, float, float],
    x: ref.Array,
) -> ref.Array:
    """One expert on x [M, H]."""
    alpha, limit, offset = gate
    x = x.astype(np.float64)
    g, u = (x @ w.T.astype(np.float64) + b for w, b in zip(parts[:2], biases[:2], strict=True))
    g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    h = g / (1 + np.exp(-alpha * g)) * (u + offset)
    return h @ parts[2].T.astype(np.float64) + biases[2]


def make(name: str, isa: str, threads: int = 2) -> tuple[Any, list[tuple[ref.Array, ...]], list[ref.Array]]:
    """(layer, weights of each expert, stacked biases)."""
    rng = np.random.default_rng(71)
    experts = [ref.random_expert(rng, HIDDEN, INNER, name) for _ in range(EXPERTS)]
    layer = ref.make_layer(_kernels.Engine(threads, isa), experts)
    parts = [_kernels.unpack_expert(name, expert.blob(), HIDDEN, INNER) for expert in experts]
    biases = [rng.standard_normal((EXPERTS, width)).astype(np.float32) for width in (INNER, INNER, HIDDEN)]
    return layer, parts, biases


def expected(
    parts: list[Any],
    biases: list[ref.Array],
    gate: tuple[float, float, float],
    x: Any,
    ids: Any,
    weights: Any,
) -> ref.Array:
    out = np.zeros((len(x), HIDDEN))
    for expert in range(EXPERTS):
        own = tuple(bias[expert] for bias in biases)
        y = forward(parts[expert], own, gate, x)
        out += np.where(ids == expert, weights, 0.0).sum(axis=1, keepdims=True) * y
    return out


def relative(got: ref.Array, wanted: ref.Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.isa
@pytest.mark.parametrize("tokens", [1, 2, 3, 40, 90])
@pytest.mark.parametrize("gate", [OPENAI, SILU])
@pytest.mark.parametrize("name", ref.FORMATS)
def test_against_numpy(isa: str, name: str, gate: tuple[float, float, float], tokens: int) -> None:
    layer, parts, biases = make(name, isa)
    layer.set_biases(*biases)
    if gate is not SILU:
        layer.set_gate(*gate)
    rng = np.random.default_rng(72)
    x = ref.bf16_matrix(rng, tokens, HIDDEN)
    ids, weights = ref.routing(rng, tokens, 3, EXPERTS)
    got = ref.forward(layer, x, ids, weights)
    tolerance = 0.02 if name != "bf16" else 1e-6
    assert relative(got, expected(parts, biases, gate, x, ids, weights)) <= tolerance
    bits = ref.forward(layer, ref.to_bf16(x), ids, weights)
    assert relative(bits, expected(parts, biases, gate, x, ids, weights)) <= max(tolerance, 5e-3)
    for i, bias in enumerate(biases):  # each of them can be seen
        changed = [*biases]
        changed[i] = np.roll(bias, 1, axis=1)
        assert relative(got, expected(parts, changed, gate, x, ids, weights)) > 0.05


@pytest.mark.isa
@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_a_gate_of_silu_is_the_plain_kernel(isa: str, name: str) -> None:
    layer, _, _ = make(name, isa)
    rng = np.random.default_rng(73)
    x = ref.bf16_matrix(rng, 30, HIDDEN)
    ids, weights = ref.routing(rng, 30, 3, EXPERTS)
    plain = ref.forward(layer, x, ids, weights)
    layer.set_gate(*SILU)
    assert relative(ref.forward(layer, x, ids, weights), plain) <= (1e-3 if name == "int8" else 1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads: int) -> None:
    results = []
    for count in (2, threads):
        layer, _, biases = make("int8", "", count)
        layer.set_biases(*biases)
        layer.set_gate(*OPENAI)
        rng = np.random.default_rng(74)
        ids, weights = ref.routing(rng, 50, 3, EXPERTS)
        results.append(ref.forward(layer, ref.bf16_matrix(rng, 50, HIDDEN), ids, weights))
    assert np.array_equal(*results)


@pytest.mark.parametrize("tokens", [1, 20])
def test_nan_stays_in_its_token(tokens: int) -> None:
    layer, _, biases = make("bf16", "")
    layer.set_biases(*biases)
    layer.set_gate(*OPENAI)
    rng = np.random.default_rng(75)
    x, (ids, weights) = ref.bf16_matrix(rng, tokens, HIDDEN), ref.routing(rng, tokens, 2, EXPERTS)
    clean = ref.forward(layer, x, ids, weights)
    x[0, 3] = np.nan
    got = ref.forward(layer, x, ids, weights)
    assert np.isnan(got[0]).all()
    assert np.array_equal(got[1:], clean[1:])


def test_what_is_refused() -> None:
    layer, _, biases = make("int8", "")
    with pytest.raises(ValueError, match="down has shape"):
        layer.set_biases(biases[0], biases[1], biases[0])
    with pytest.raises(ValueError, match="gate must be float32"):
        layer.set_biases(biases[0].astype(np.float64), biases[1], biases[2])
    with pytest.raises(ValueError, match="limit must be above 0"):
        layer.set_gate(1.0, float("nan"), 0.0)
