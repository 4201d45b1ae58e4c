"""Stored matrices, their dequantisation, and the linears made of them.

Tolerances: a float32 dot product of K terms is off by about sqrt(K) * 2^-24; a bf16 input by 2^-9 per term,
which averages to 2^-9 of the result's own scale; an int8 input by 1/254 of the row's largest value per term.
"""

from typing import Any

import numpy as np
import pytest
import torch

from kttools_runtime.errors import InvalidInputError
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.linear import LinearSpec, PackedCpuLinear, Placement, TorchLinear
from kttools_runtime.norm import RMSNorm
from kttools_runtime.weights import LinearWeights, stack
from tests.compare import assert_close
from tests.oracle import DictWeights, quantized

SHAPES = [(96, 64), (160, 128), (37, 129), (1, 200), (33, 31)]
FORMATS = ["bf16", "int8", "int4"]
INPUT_TOL = {"bf16": 2**-7, "int8": 2**-6, "int4": 2**-6}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).float()


def placement(
    weights: dict[str, torch.Tensor], form: str, dtype: torch.dtype, kernels: bool = True
) -> Placement:
    pool = ExpertEngine(1).native if kernels else None
    return Placement(DictWeights(weights, form, 32), torch.device("cpu"), dtype, pool)


def plain_int4(matrix: LinearWeights) -> np.ndarray:
    """w = row_scale * (group_scale * q - group_zero), element by element."""
    q, scale, zero, row = (
        matrix.parts[key].numpy() for key in ("qweight", "group_scale", "group_zero", "row_scale")
    )
    out = np.empty((q.shape[0], matrix.in_features), dtype=np.float64)
    for n in range(out.shape[0]):
        for k in range(out.shape[1]):
            nibble = int(q[n, k // 2]) >> (4 * (k % 2)) & 15
            group = k // matrix.group_size
            out[n, k] = row[n] * (int(scale[n, group]) * nibble - int(zero[n, group]))
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_dequantisation(shape: tuple[int, int], group_size: int) -> None:
    weight = random(*shape)
    matrix = quantized("m", weight, "int4", group_size)
    assert matrix.group_size == group_size
    assert_close(matrix.dequantized(), torch.from_numpy(plain_int4(matrix)), 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_close_to_the_weight(shape: tuple[int, int], group_size: int) -> None:
    """Half a step of 1/15 of the range is 0.07 of the largest value; clipping may double it."""
    weight = random(*shape)
    assert_close(quantized("m", weight, "int4", group_size).dequantized(), weight, 0.15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
def test_linear_of_every_format(shape: tuple[int, int], form: str, num_tokens: int) -> None:
    weights = {"m.weight": random(*shape), "m.bias": random(shape[0], seed=2)}
    x = random(num_tokens, shape[1], seed=1)
    spec = LinearSpec("m", shape[0], has_bias=True)
    exact = quantized("m", weights["m.weight"], form, 32).dequantized().double()
    expected = x.double() @ exact.T + weights["m.bias"]
    reference = placement(weights, form, torch.float32).linear(spec, shape[1])
    assert isinstance(reference, TorchLinear)
    assert_close(reference(x), expected, 1e-5)
    default = placement(weights, form, torch.bfloat16).linear(spec, shape[1])
    assert isinstance(default, PackedCpuLinear)
    assert_close(default(x), expected, INPUT_TOL[form])
    by_torch = placement(weights, form, torch.bfloat16, kernels=False).linear(spec, shape[1])
    assert_close(by_torch(x), expected, 2**-6)


@pytest.mark.parametrize("form", FORMATS)
def test_row_order_reaches_weight_and_bias(form: str) -> None:
    weights = {"m.weight": random(12, 64), "m.bias": random(12, seed=2)}
    x = random(3, 64, seed=1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    place = placement(weights, form, torch.float32)
    plain = place.linear(LinearSpec("m", 12, has_bias=True), 64)(x)
    ordered = place.linear(LinearSpec("m", 12, has_bias=True, row_order=order), 64)(x)
    assert_close(ordered, plain[:, order], 1e-6)


class Mixed(DictWeights):
    """One matrix of the group in another format."""

    def linear(self, base: str, out_features: int, in_features: int) -> LinearWeights:
        form = "int8" if base == "b" else "bf16"
        return quantized(base, self.tensor(f"{base}.weight", (out_features, in_features)), form)


@pytest.mark.parametrize("source", [DictWeights, Mixed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_equals_its_members(source: Any, dtype: torch.dtype) -> None:
    weights = {"a.weight": random(20, 64), "b.weight": random(7, 64, seed=1), "b.bias": random(7, seed=2)}
    place = Placement(source(weights), torch.device("cpu"), dtype, ExpertEngine(1).native)
    specs = [LinearSpec("a", 20), LinearSpec("b", 7, has_bias=True)]
    group = place.group(specs, 64)
    assert len(group.linears) == (1 if source is DictWeights else 2)
    x = random(4, 64, seed=3)
    for got, spec in zip(group(x), specs, strict=True):
        assert_close(got, place.linear(spec, 64)(x), 1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_stack_keeps_rows(form: str) -> None:
    a, b = quantized("a", random(5, 64), form, 32), quantized("b", random(9, 64, seed=1), form, 32)
    both = stack([a, b])
    assert both.out_features == 14
    assert torch.equal(both.dequantized(), torch.cat([a.dequantized(), b.dequantized()]))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"weight": torch.zeros(2, 7, dtype=torch.bfloat16)},
            r"m\.weight: expected shape \(2, 8\), got \(2, 7\)",
        ),
        ({"weight": torch.zeros(2, 8, dtype=torch.int32)}, r"m\.weight: expected bfloat16 or float16"),
        ({"qweight": torch.zeros(2, 8, dtype=torch.int8)}, r"m: float needs weight, got qweight"),
    ],
)
def test_bad_float_parts(parts: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        LinearWeights("m", 8, "float", parts)


@pytest.mark.parametrize("suffix", ["qweight", "group_scale", "group_zero", "row_scale"])
@pytest.mark.parametrize("change", ["rows", "columns", "dtype"])
def test_bad_int4_parts(suffix: str, change: str) -> None:
    parts = dict(quantized("m", random(6, 128), "int4", 32).parts)
    part = parts[suffix]
    if change == "rows":
        parts[suffix] = part[:-1]
    elif change == "columns":
        parts[suffix] = torch.cat([part, part], dim=-1)
    else:
        parts[suffix] = part.to(torch.int64)
    with pytest.raises(InvalidInputError, match=r"m\.\w+: expected"):
        LinearWeights("m", 128, "int4", parts)


def test_norm_against_its_definition() -> None:
    x, weight = random(4, 100), random(100, seed=1)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert_close(RMSNorm(weight, 1e-6)(x), expected, 1e-6)
    fused = RMSNorm(weight, 1e-6, is_fused=True)  # what CUDA takes
    assert_close(fused(x), expected, 1e-6)
    assert_close(fused.apply_(x.clone()), expected, 1e-6)
    assert_close(RMSNorm(weight, 1e-6)(torch.zeros(2, 100)), torch.zeros(2, 100), 0.0)
    tiny = 1e-6 * x
    expected = tiny.double() / (tiny.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert_close(RMSNorm(weight, 1e-6)(tiny), expected, 1e-6)
