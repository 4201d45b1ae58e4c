"""The one comparer of numerical tests. It is written as `not (err <= tol)`, so that NaN fails."""

import torch
from torch import Tensor


def assert_close(got: Tensor, expected: Tensor, tol: float, what: str = "result") -> None:
    """Largest absolute error over largest expected magnitude at most tol; equal shapes."""
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    err = relative_error(got, expected)
    if not (err <= tol):
        raise AssertionError(f"{what}: error {err:.3g} above {tol:.3g}")


def relative_error(got: Tensor, expected: Tensor) -> float:
    """max |got - expected| / max |expected|; NaN when either holds one. Empty tensors agree."""
    if expected.numel() == 0:
        return 0.0
    got64, expected64 = got.to(torch.float64), expected.to(torch.float64)
    scale = float(expected64.abs().max()) or 1.0
    return float((got64 - expected64).abs().max()) / scale


def mean_kl(logits: Tensor, reference: Tensor) -> float:
    """Mean over rows of KL(reference || logits) in nats; both [T, vocab_size]. NaN when either holds one."""
    if logits.shape != reference.shape:
        raise AssertionError(f"logits of shape {tuple(logits.shape)}, expected {tuple(reference.shape)}")
    log_p = torch.log_softmax(reference.to(torch.float64), dim=-1)
    log_q = torch.log_softmax(logits.to(torch.float64), dim=-1)
    return float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())


def top1_agreement(logits: Tensor, reference: Tensor) -> float:
    """Share of rows with the same most likely token."""
    return float((logits.argmax(dim=-1) == reference.argmax(dim=-1)).double().mean())


def assert_same_distribution(
    logits: Tensor, reference: Tensor, kl: float, top1: float = 0.0, what: str = "logits"
) -> None:
    """Mean KL at most `kl` and top-1 agreement at least `top1`."""
    got_kl, got_top1 = mean_kl(logits, reference), top1_agreement(logits, reference)
    if not (got_kl <= kl):
        raise AssertionError(f"{what}: mean KL {got_kl:.3g} above {kl:.3g}")
    if not (got_top1 >= top1):
        raise AssertionError(f"{what}: top-1 agreement {got_top1:.4f} below {top1:.4f}")
