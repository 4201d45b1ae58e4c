"""The error measures against plain NumPy in float64, and the report they make."""

import json
import math

import numpy as np
import pytest
import torch

from kttools.quantize.report import (
    DIGITS,
    ErrorSums,
    TensorError,
    as_float32,
    by_role,
    error_sums,
    report_bytes,
    summary,
    worst,
)


def error(name: str, rms: float, role: str = "attention", format_name: str = "int4") -> TensorError:
    return TensorError(name, role, format_name, (2, 3), rms, 2 * rms, 1 - rms)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (700, 800)])
def test_sums_are_those_of_numpy(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    source = rng.standard_normal(shape, dtype=np.float32)
    stored = source + rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05)
    sums = error_sums(source, stored)
    a, b = source.astype(np.float64).ravel(), stored.astype(np.float64).ravel()
    assert sums.relative_rms == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-6)
    assert sums.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-9)
    assert sums.max_abs_error == pytest.approx(np.abs(a - b).max(), rel=1e-6)


def test_sums_see_what_they_must() -> None:
    source = np.ones((4, 4), dtype=np.float32)
    assert error_sums(source, source) == ErrorSums(16.0, 16.0, 0.0, 0.0)
    assert error_sums(source, -source).cosine == -1.0
    one_wrong = source.copy()
    one_wrong[3, 3] = 3.0
    assert error_sums(source, one_wrong).max_abs_error == 2.0
    assert error_sums(source, one_wrong).relative_rms == 0.5
    zero = np.zeros_like(source)
    assert (error_sums(zero, zero).relative_rms, error_sums(zero, zero).cosine) == (0.0, 1.0)
    assert (error_sums(zero, source).relative_rms, error_sums(zero, source).cosine) == (1.0, 0.0)
    assert error_sums(source, zero).cosine == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sums_of_what_is_no_number_are_not_finite(bad: float) -> None:
    source = np.ones((4, 4), dtype=np.float32)
    damaged = source.copy()
    damaged[1, 2] = bad
    assert not error_sums(damaged, source).is_finite
    assert not error_sums(source, damaged).is_finite


def test_extreme_magnitudes_neither_overflow_nor_vanish() -> None:
    source = np.array([[3e38, 1e-38]], dtype=np.float32)
    assert error_sums(source, source * np.float32(0.5)).relative_rms == pytest.approx(0.5)
    tiny = np.array([[1e-30]], dtype=np.float32)
    assert error_sums(tiny, tiny * np.float32(0.5)).relative_rms == pytest.approx(0.5)


def test_bf16_and_f16_are_widened_exactly() -> None:
    values = torch.randn(1000)
    bf16, f16 = values.to(torch.bfloat16), values.to(torch.float16)
    assert np.array_equal(as_float32(bf16.view(torch.uint16).numpy()), bf16.float().numpy())
    assert np.array_equal(as_float32(f16.numpy()), f16.float().numpy())


def test_sums_of_parts_add_up() -> None:
    rng = np.random.default_rng(1)
    source, stored = (rng.standard_normal((90, 7), dtype=np.float32) for _ in range(2))
    whole = error_sums(source, stored)
    parts = error_sums(source[:30], stored[:30]) + error_sums(source[30:], stored[30:])
    assert parts.relative_rms == pytest.approx(whole.relative_rms, rel=1e-12)
    assert parts.max_abs_error == whole.max_abs_error


def test_numbers_are_rounded() -> None:
    sums = ErrorSums(1.0, 1.0, 1 / 9, 1 / 3)
    found = TensorError.of("x", "attention", "int4", (1, 1), sums)
    assert found.relative_rms == found.max_abs_error == round(1 / 3, DIGITS)
    assert TensorError.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_roles_and_worst() -> None:
    errors = [error("a", 0.1), error("b", 0.3), error("c", 0.5, "head", "int8"), error("d", 0.0)]
    means = {(role.role, role.format): role for role in by_role(errors)}
    assert means["attention", "int4"].mean_relative_rms == pytest.approx(0.4 / 3, rel=1e-5)
    assert means["attention", "int4"].worst_relative_rms == 0.3
    assert means["attention", "int4"].matrices == 3
    assert means["head", "int8"].mean_cosine == 0.5
    assert [e.name for e in worst(errors)] == ["c", "b", "a"]
    assert [e.name for e in worst(errors, 1)] == ["c"]


def test_report_and_summary() -> None:
    errors = [error("model.a.weight", 0.1), error("lm_head.weight", 0.5, "head", "int8")]
    document = json.loads(report_bytes({"gpu_format": "int4"}, errors))
    assert [t["name"] for t in document["tensors"]] == ["model.a.weight", "lm_head.weight"]
    assert document["recipe"] == {"gpu_format": "int4"}
    assert {role["role"] for role in document["roles"]} == {"attention", "head"}
    text = summary(errors)
    assert "lm_head.weight" in text.split("worst by relative rms:")[1]
    assert "worst" not in summary([error("a", 0.0)]).split("\n", 1)[1]
