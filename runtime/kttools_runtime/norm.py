"""Root-mean-square norm, always in float32 (arXiv 1910.07467; `rms_norm_eps` of config.json)."""

import math

import torch
from torch import Tensor


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; float32 in, new float32 tensor out.

    The mean is folded into the weight, x * rsqrt(sum(x^2) + n eps) * (sqrt(n) weight): two operations fewer,
    and at decode an operation costs more than its arithmetic.
    """

    __slots__ = ("scaled_weight", "sum_eps")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.scaled_weight = weight.to(torch.float32) * math.sqrt(weight.numel())
        self.sum_eps = eps * weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        return (x * self._scale(x)).mul_(self.scaled_weight)

    def apply_(self, x: Tensor) -> Tensor:
        """The same in place, for a slice of a projection that nothing else reads."""
        return x.mul_(self._scale(x)).mul_(self.scaled_weight)

    def _scale(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norm.square_().add_(self.sum_eps).rsqrt_()
