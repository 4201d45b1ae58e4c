"""What a profile counts: additive float64 sums over the observations of one MoE layer.

Every value is a sum or (names with max_) a maximum, so two profiles of different documents add up. A shard's
sums are made in document order and shards are added in sorted order: the total does not depend on who
computed which shard.
"""

import torch
from torch import Tensor

from .recorder import Observation

# log2 bins of the squared norm of a weighted output: bin i holds [2^(i-32), 2^(i-31)).
GRAM_BINS = 64
GRAM_BIN_OFFSET = 32
LRU_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
Stats = dict[str, Tensor]


def lru_sizes(n_routed_experts: int) -> list[int]:
    """Cache sizes, in experts, whose hit counts are kept."""
    return sorted({max(1, round(share * n_routed_experts)) for share in LRU_SHARES})


def layer_statistics(seen: Observation, hidden_energy: Tensor, n_routed_experts: int) -> Stats:
    """One layer on one window. hidden_energy: float32 [T], squared norm of the residual stream."""
    ids, w = seen.expert_ids, seen.weights.double()
    own = torch.diagonal(seen.gram, dim1=1, dim2=2).double()
    norm2 = own / w.square().clamp_min(1e-60)
    stats = _per_expert(ids, w, own, norm2, n_routed_experts)
    stats |= _grams(seen, hidden_energy)
    stats |= _locality(ids, n_routed_experts)
    stats["tokens"] = torch.tensor(float(ids.shape[0]), dtype=torch.float64)
    stats["hidden_energy"] = hidden_energy.double().sum()
    stats["output_energy"] = seen.gram.sum(dim=(1, 2)).double().sum()
    return stats


def add(total: Stats, more: Stats) -> Stats:
    """total + more, in place and returned; an empty total takes over the shapes of more."""
    for name, value in more.items():
        if name not in total:
            total[name] = value.clone()
        elif name.startswith("max_"):
            torch.maximum(total[name], value, out=total[name])
        else:
            total[name] += value
    return total


def _per_expert(ids: Tensor, w: Tensor, own: Tensor, norm2: Tensor, count: int) -> Stats:
    flat, norm = ids.flatten(), norm2.sqrt()
    columns = {
        "count": torch.ones_like(w),
        "sum_w": w,
        "sum_w2": w.square(),
        "sum_norm": norm,
        "sum_norm2": norm2,
        "sum_w_norm": w * norm,
        "energy": own,
    }
    stats = {
        name: torch.bincount(flat, weights=value.flatten(), minlength=count)
        for name, value in columns.items()
    }
    k = ids.shape[1]
    rank = w.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    stats["rank_histogram"] = torch.bincount((ids * k + rank).flatten(), minlength=count * k)
    stats["rank_histogram"] = stats["rank_histogram"].double().view(count, k)
    stats["max_norm"] = torch.zeros(count, dtype=torch.float64).scatter_reduce_(
        0, flat, norm.flatten(), "amax"
    )
    stats["max_norm_first"] = torch.zeros(count, dtype=torch.float64).scatter_reduce_(
        0, ids[0], norm[0], "amax"
    )
    return stats


def _grams(seen: Observation, hidden_energy: Tensor) -> Stats:
    k = seen.weights.shape[1]
    ranked = by_rank(seen.gram, seen.weights.argsort(dim=1, descending=True, stable=True))
    relative = 1.0 / hidden_energy.double().clamp_min(1e-30)
    own = torch.diagonal(ranked, dim1=1, dim2=2)
    bins = (own.clamp_min(1e-30).log2().floor() + GRAM_BIN_OFFSET).clamp_(0, GRAM_BINS - 1).long()
    bins += torch.arange(k) * GRAM_BINS
    histogram = torch.bincount(bins.flatten(), minlength=k * GRAM_BINS)
    flat = ranked.double().view(-1, k * k)
    return {
        "gram_choice": seen.gram.double().sum(dim=0),
        "gram_weight": flat.sum(dim=0).view(k, k),
        "gram_weight_rel": (relative @ flat).view(k, k),
        "gram_histogram": histogram.double().view(k, GRAM_BINS),
    }


def by_rank(gram: Tensor, ranks: Tensor) -> Tensor:
    """gram [T, K, K] with both axes permuted by ranks [T, K]."""
    k = ranks.shape[1]
    pairs = (ranks[:, :, None] * k + ranks[:, None, :]).view(-1, k * k)
    return gram.view(-1, k * k).gather(1, pairs).view(-1, k, k)


def _locality(ids: Tensor, count: int) -> Stats:
    """Co-activation, reuse by the next token, and hits of LRU caches of experts over the window."""
    num_tokens = ids.shape[0]
    chosen = torch.zeros(num_tokens, count).scatter_(1, ids, 1.0)
    time = torch.arange(num_tokens, dtype=torch.int32)[:, None]
    used = torch.where(chosen > 0, time, -1).cummax(dim=0).values
    before = torch.cat([torch.full((1, count), -1, dtype=torch.int32), used[:-1]])
    last = before.gather(1, ids)
    # An expert's place in the cache: how many experts were used since its own last use.
    younger = torch.stack([(before > last[:, [r]]).sum(dim=1) for r in range(ids.shape[1])], dim=1)
    place = torch.where(last < 0, count, younger)
    hits = [(place < size).sum() for size in lru_sizes(count)]
    return {
        "coactivation": (chosen.T @ chosen).double(),
        "reuse_next": (chosen[1:] * chosen[:-1]).sum().double(),
        "lru_hits": torch.stack(hits).double(),
    }
