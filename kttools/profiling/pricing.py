"""What a policy costs at layer level, read from rank Grams; and the scale that makes it cheapest.

With y = sum y_r and multipliers u, ||y - sum u_r y_r||^2 = (1 - u)^T G (1 - u), exactly.
"""

import torch
from torch import Tensor

from .recorder import Observation
from .statistics import by_rank


def errors(gram: Tensor, keeps: Tensor) -> Tensor:
    """Squared errors (1 - u)^T G (1 - u). gram [..., K, K] and keeps [..., K] (u)."""
    rest = 1.0 - keeps.to(gram.dtype)
    return torch.einsum("...i,...ij,...j->...", rest, gram, rest)


def prefix_scales(gram: Tensor) -> Tensor:
    """alpha[n - 1] = 1^T G u / u^T G u for keeping the first n ranks. gram [K, K] -> [K]."""
    kept = gram.cumsum(dim=0).cumsum(dim=1).diagonal()
    cross = gram.sum(dim=0).cumsum(dim=0)
    return torch.where(kept > 0, cross / kept.clamp_min(1e-60), 1.0)


def prefix_errors(gram: Tensor, scales: Tensor | None = None) -> Tensor:
    """Squared error of keeping the first n ranks, index n - 1, scaled (None: by prefix_scales)."""
    scales = prefix_scales(gram) if scales is None else scales
    k = gram.shape[0]
    keeps = torch.tril(torch.ones(k, k, dtype=gram.dtype)) * scales[:, None]
    return errors(gram.expand(k, k, k), keeps)


def counted_scales(seen: Observation, ranks: Tensor, count: Tensor, fallback: Tensor) -> Tensor:
    """alpha[n - 1] over the tokens that keep n of their ranks; `fallback` where fewer than 32 do.

    ranks int64 [T, K], count int64 [T].
    """
    gram = by_rank(seen.gram, ranks).double()
    k = gram.shape[1]
    keep = (torch.arange(k) < count[:, None]).double()
    cross = torch.einsum("tij,tj->t", gram, keep)
    kept = torch.einsum("ti,tij,tj->t", keep, gram, keep)
    index = count - 1
    tokens = torch.bincount(index, minlength=k)
    above = torch.bincount(index, weights=cross, minlength=k)
    below = torch.bincount(index, weights=kept, minlength=k)
    return torch.where((tokens >= 32) & (below > 0), above / below.clamp_min(1e-60), fallback)
