"""A gated MLP in fused passes against its three matrices, one after the other."""

from typing import Any

import numpy as np
import pytest
import torch

from kttools_runtime import _kernels
from tests.compare import assert_close

SUM_EPS = 1e-6


class Mlp:
    """Random matrices as DenseStep takes them, and what it adds to a row, from plain products."""

    def __init__(self, engine: Any, hidden: int, inner: int, kinds: str, is_split: bool) -> None:
        generator = np.random.default_rng(hidden + inner)
        self.hidden, self.inner = hidden, inner

        def matrix(kind: str, n: int, k: int) -> Any:
            if kind == "int8":
                codes = generator.integers(-127, 128, (n, k), dtype=np.int8)
                scale = generator.uniform(0.5, 1.5, n).astype(np.float32) / (73 * k**0.5)
                return _kernels.PackedLinear.from_int8(engine, codes, scale.astype(np.float32))
            weights = torch.from_numpy(generator.standard_normal((n, k)) / k**0.5).to(torch.bfloat16)
            return _kernels.PackedLinear.from_bf16(engine, weights.view(torch.uint16).numpy())

        first, last = kinds.split("+")[0], kinds.split("+")[-1]
        if is_split:
            self.gate_up = [matrix(first, inner, hidden), matrix(last, inner, hidden)]
        else:
            self.gate_up = [matrix(first, 2 * inner, hidden)]
        self.down = matrix(last, hidden, inner)
        norm = (np.full(hidden, hidden**0.5, np.float32), SUM_EPS)
        self.step = _kernels.DenseStep(engine, norm, self.gate_up, self.down)

    def expected(self, x: np.ndarray) -> np.ndarray:
        normed = x / np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True) + SUM_EPS) * self.hidden**0.5
        outputs = [self._times(linear, normed.astype(np.float32)) for linear in self.gate_up]
        gate, up = np.split(np.concatenate(outputs, -1).astype(np.float64), 2, -1)
        return self._times(self.down, (gate / (1 + np.exp(-gate)) * up).astype(np.float32))

    @staticmethod
    def _times(linear: Any, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), linear.out_features), np.float32)
        linear.forward(rows, out)
        return out


def rows_of(count: int, hidden: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, hidden)).astype(np.float32)


# An inner size that is no multiple of a strip and formats that differ have no fused pass; the last case
# stores its inner rows past the caches and takes two pieces of rows.
@pytest.mark.parametrize(
    ("hidden", "inner", "rows", "kinds", "is_split"),
    [
        (100, 96, 1, "int8", False),
        (100, 96, 37, "int8", True),
        (65, 70, 37, "int8", False),
        (64, 64, 5, "bf16", True),
        (64, 32, 40, "bf16+int8", True),
        (32, 4096, 600, "int8", False),
    ],
)
def test_fused_passes_give_what_the_matrices_give(
    isa: str, hidden: int, inner: int, rows: int, kinds: str, is_split: bool
) -> None:
    mlp = Mlp(_kernels.Engine(2, isa), hidden, inner, kinds, is_split)
    x = rows_of(rows, hidden)
    got = x.copy()
    mlp.step.forward(got)
    # Last bits of norm and silu decide where a few codes are rounded to: one of 127.
    tolerance = 0.02
    assert_close(torch.from_numpy(got - x), torch.from_numpy(mlp.expected(x)), tolerance)


@pytest.mark.parametrize("rows", [3, 70, 600])
def test_fused_passes_are_the_same_bits_for_any_threads_and_every_time(isa: str, rows: int) -> None:
    results = []
    for threads in (1, 2, 3, 2):
        mlp = Mlp(_kernels.Engine(threads, isa), 160, 416, "int8", False)
        hidden = rows_of(rows, 160)
        mlp.step.forward(hidden)
        results.append(hidden)
    assert all(np.array_equal(results[0].view(np.int32), other.view(np.int32)) for other in results[1:])
