"""Root-mean-square norm, always in float32 (arXiv 1910.07467; `rms_norm_eps` of config.json)."""

import math

import torch
from torch import Tensor
from torch.nn import functional


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; float32 in, new float32 tensor out.

    On the CPU the mean is folded into the weight, x * rsqrt(sum(x^2) + n eps) * (sqrt(n) weight): two
    operations fewer, and at decode an operation costs more than its arithmetic. On CUDA it is torch's fused
    kernel: one launch where the operations here are six.
    """

    __slots__ = ("eps", "is_fused", "scaled_weight", "sum_eps", "weight")

    def __init__(self, weight: Tensor, eps: float, is_fused: bool | None = None) -> None:
        """is_fused: None for what the weight's device has."""
        self.is_fused = weight.is_cuda if is_fused is None else is_fused
        self.eps = eps
        self.weight = weight.to(torch.float32) if self.is_fused else torch.empty(0)
        self.scaled_weight = weight.to(torch.float32) * math.sqrt(weight.numel())
        self.sum_eps = eps * weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_fused:
            return self._fused(x)
        return (x * self._scale(x)).mul_(self.scaled_weight)

    def apply_(self, x: Tensor) -> Tensor:
        """The same in place, for a slice of a projection that nothing else reads."""
        if self.is_fused:
            return x.copy_(self._fused(x))
        return x.mul_(self._scale(x)).mul_(self.scaled_weight)

    def _fused(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def _scale(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norm.square_().add_(self.sum_eps).rsqrt_()
