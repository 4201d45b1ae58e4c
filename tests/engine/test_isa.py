"""Kernel tables: each can be forced, unknown names are refused, and the forced one is the one that ran.

The proof is arithmetic. A float32 sum rounds after every step, so its last bits tell the order of its steps,
and every table sums a row of bf16 weights in an order of its own. The orders are computed here in NumPy and
compared with the kernels bit by bit: with float32 activations, and with bf16 (the matrix unit's own path).
"""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest

from kttools_runtime import _kernels
from kttools_runtime.errors import HardwareError
from kttools_runtime.experts import ExpertEngine, available_isas
from tests.engine import reference as ref

M, N, K = 8, 32, 512


def fused(total: ref.Array, a: ref.Array, b: ref.Array) -> ref.Array:
    """a * b + total with one rounding: products and sums of the inputs below are exact in float64."""
    return (total.astype(np.float64) + a.astype(np.float64) * b.astype(np.float64)).astype(np.float32)


def column(x: ref.Array, w: ref.Array, k: int) -> tuple[ref.Array, ref.Array]:
    """x[:, k] and w[:, k], broadcast to [M, N]."""
    return np.repeat(x[:, k : k + 1], len(w), axis=1), np.repeat(w[None, :, k], len(x), axis=0)


def scalar_sum(x: ref.Array, w: ref.Array) -> ref.Array:
    """One accumulator, product and sum rounded apart (a product of two bf16 is exact)."""
    total = np.zeros((len(x), len(w)), dtype=np.float32)
    for k in range(x.shape[1]):
        a, b = column(x, w, k)
        total = total + a * b
    return total


def avx2_sum(x: ref.Array, w: ref.Array) -> ref.Array:
    """One accumulator, fused."""
    total = np.zeros((len(x), len(w)), dtype=np.float32)
    for k in range(x.shape[1]):
        total = fused(total, *column(x, w, k))
    return total


def pair_sums(x: ref.Array, w: ref.Array, ks: range) -> ref.Array:
    """Two fused accumulators, of even and of odd k, added at the end."""
    totals = [np.zeros((len(x), len(w)), dtype=np.float32) for _ in range(2)]
    for k in ks:
        totals[k % 2] = fused(totals[k % 2], *column(x, w, k))
    return totals[0] + totals[1]


def avx512_sum(x: ref.Array, w: ref.Array) -> ref.Array:
    return pair_sums(x, w, range(x.shape[1]))


def amx_sum(x: ref.Array, w: ref.Array) -> ref.Array:
    """TDPBF16PS: even and odd k of 32 are summed apart, then added to the tile of C."""
    total = np.zeros((len(x), len(w)), dtype=np.float32)
    for begin in range(0, x.shape[1], 32):
        total = total + pair_sums(x, w, range(begin, begin + 32))
    return total


Sum: TypeAlias = Callable[[ref.Array, ref.Array], ref.Array]
# How each table sums with float32 activations, and with bf16 activations of at least three rows.
SUMS: dict[str, tuple[Sum, Sum]] = {
    "scalar": (scalar_sum, scalar_sum),
    "avx2": (avx2_sum, avx2_sum),
    "avx512": (avx512_sum, avx512_sum),
    "amx": (avx512_sum, amx_sum),
}


def inputs() -> tuple[ref.Array, ref.Array, ref.Array]:
    """x float32 [M, K], x rounded to bf16, w [N, K] bf16, all in +-[2^-6, 2).

    Products are multiples of 2^-42 and sums below 2^10: float64 adds them exactly, float32 does not.
    """
    rng = np.random.default_rng(21)
    x, w = (rng.choice([-1, 1], (rows, K)) * 2.0 ** rng.uniform(-6, 1, (rows, K)) for rows in (M, N))
    x = x.astype(np.float32)
    return x, ref.from_bf16(ref.to_bf16(x)), ref.from_bf16(ref.to_bf16(w))


def expected_bits(name: str) -> str:
    """Hex of both sums as the table of that name computes them."""
    wide, half, w = inputs()
    return SUMS[name][0](wide, w).tobytes().hex() + SUMS[name][1](half, w).tobytes().hex()


def kernel_bits(engine: _kernels.Engine) -> str:
    """Hex of both sums as the engine computes them."""
    wide, half, w = inputs()
    linear = _kernels.PackedLinear.from_bf16(engine, ref.to_bf16(w))
    outs = [np.empty((M, N), dtype=np.float32) for _ in range(2)]
    linear.forward(wide, outs[0])
    linear.forward(ref.to_bf16(half), outs[1])
    return outs[0].tobytes().hex() + outs[1].tobytes().hex()


def test_sums_differ() -> None:
    """Each order gives other bits than every other: a table cannot pass for another."""
    assert len({expected_bits(name) for name in SUMS}) == len(SUMS)


def test_forced_table_runs(isa: str) -> None:
    engine = _kernels.Engine(1, isa)
    assert engine.isa == isa
    got = kernel_bits(engine)
    who = [name for name in SUMS if got == expected_bits(name)]
    assert who == [isa], f"engine.isa is {isa}; if {who} is empty, has its order of summation changed?"


FORCED = """
import json
from kttools_runtime.experts import ExpertEngine
from tests.engine.test_isa import kernel_bits
engine = ExpertEngine(1)
print(json.dumps([engine.isa, kernel_bits(engine.native)]))
"""


def test_environment_forces_the_table(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTTOOLS_ISA", isa)
    done = subprocess.run([sys.executable, "-c", FORCED], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [isa, expected_bits(isa)]


def test_argument_wins_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTTOOLS_ISA", "no such table")
    assert ExpertEngine(1, "scalar").isa == "scalar"


def test_best_table_is_the_default() -> None:
    best = _kernels.available_isas()[0]
    assert (_kernels.Engine(1).isa, _kernels.Engine(1, None).isa, ExpertEngine(1).isa) == (best, best, best)


@pytest.mark.parametrize("name", ["avx1024", "AMX", "scalar ", "amx\n"])
def test_unknown_table_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    valid = ", ".join(available_isas())
    with pytest.raises(ValueError, match=f"unknown isa '{name}': this CPU runs {valid}"):
        _kernels.Engine(1, name)
    with pytest.raises(HardwareError, match=f"this CPU runs {valid}"):
        ExpertEngine(1, name)
    monkeypatch.setenv("KTTOOLS_ISA", name)
    with pytest.raises(HardwareError, match=f"this CPU runs {valid}"):
        ExpertEngine(1)


def test_missing_table_says_what_is_missing() -> None:
    lacking = [row for row in _kernels.isa_report() if not row["supported"]]
    if not lacking:
        pytest.skip("this CPU runs every kernel table")
    for row in lacking:
        with pytest.raises(ValueError, match=f"it lacks {', '.join(row['missing'])}"):
            _kernels.Engine(1, row["name"])


def test_report_agrees_with_features() -> None:
    features = _kernels.cpu_features()
    report = _kernels.isa_report()
    assert [row["name"] for row in report if row["supported"]] == _kernels.available_isas()
    assert report[-1] == {"name": "scalar", "supported": True, "missing": []}
    for row in report:
        assert row["supported"] == (not row["missing"])
        assert not any(features[name] for name in row["missing"])
