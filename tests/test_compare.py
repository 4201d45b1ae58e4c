"""The comparer must fail where a careless one passes."""

import pytest
import torch

from tests.compare import assert_close, assert_same_distribution, mean_kl, relative_error, top1_agreement


@pytest.fixture
def expected() -> torch.Tensor:
    return torch.linspace(-2.0, 3.0, 60).view(6, 10)


def test_equal_passes(expected: torch.Tensor) -> None:
    assert_close(expected.clone(), expected, tol=0.0)
    assert_same_distribution(expected.clone(), expected, kl=0.0, top1=1.0)


def test_small_error_passes_and_is_measured(expected: torch.Tensor) -> None:
    got = expected.clone()
    got[0, 0] += 0.003
    assert relative_error(got, expected) == pytest.approx(0.001, rel=1e-3)
    assert_close(got, expected, tol=0.0011)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["got", "expected"])
def test_non_finite_fails(expected: torch.Tensor, value: float, side: str) -> None:
    broken = expected.clone()
    broken[3, 4] = value
    pair = (broken, expected) if side == "got" else (expected, broken)
    with pytest.raises(AssertionError, match=r"error (nan|inf)"):
        assert_close(*pair, tol=1e9)


def test_nan_fails_as_distribution(expected: torch.Tensor) -> None:
    broken = expected.clone()
    broken[3, 4] = float("nan")
    with pytest.raises(AssertionError, match="mean KL nan"):
        assert_same_distribution(broken, expected, kl=1e9)


def test_sign_flip_fails(expected: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="error 2"):
        assert_close(-expected, expected, tol=1.0)
    with pytest.raises(AssertionError, match="mean KL"):
        assert_same_distribution(-expected, expected, kl=0.01)


def test_one_wrong_element_fails(expected: torch.Tensor) -> None:
    got = expected.clone()
    got[5, 9] -= 0.3
    with pytest.raises(AssertionError, match=r"error 0\.1"):
        assert_close(got, expected, tol=0.05)


def test_wrong_shape_fails(expected: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(expected[:1], expected, tol=1e9)
    with pytest.raises(AssertionError, match="shape"):
        mean_kl(expected[:1], expected)


def test_low_agreement_fails(expected: torch.Tensor) -> None:
    got = expected.clone()
    got[0, 0] = 100.0
    assert top1_agreement(got, expected) == pytest.approx(5 / 6)
    with pytest.raises(AssertionError, match=r"agreement 0\.8333"):
        assert_same_distribution(got, expected, kl=1e9, top1=0.999)
