"""What a profile counts: additive float64 sums over the tokens of one MoE layer.

Every value is a sum or (names with max_) a maximum, so two profiles of different documents add up. Sums over
choices are over every token; sums over expert outputs are over the observed tokens, each times the number of
tokens it stands for (kttools.profiling.observed), and so estimate the sums over every token:

every token      tokens, count, sum_w, sum_w2, rank_histogram, coactivation, reuse_next, lru_hits
observed tokens  observed (how many), observed_count (as count), sum_norm, sum_norm2, sum_w_norm, energy,
                 gram_choice, gram_weight, gram_weight_rel, gram_histogram, hidden_energy, output_energy
                 max_norm, max_norm_first (unweighted)

A shard's sums are made in document order and shards are added in sorted order: the total does not depend on
who computed which shard.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .observed import Sample
from .recorder import Choices, Observation

# log2 bins of the squared norm of a weighted output: bin i holds [2^(i-32), 2^(i-31)).
GRAM_BINS = 64
GRAM_BIN_OFFSET = 32
LRU_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
Stats = dict[str, Tensor]


def lru_sizes(n_routed_experts: int) -> list[int]:
    """Cache sizes, in experts, whose hit counts are kept."""
    return sorted({max(1, round(share * n_routed_experts)) for share in LRU_SHARES})


def choice_statistics(chosen: Choices, lengths: Sequence[int], n_routed_experts: int) -> Stats:
    """One layer on one batch: what the router did. lengths: tokens of each window."""
    ids, count = chosen.expert_ids, n_routed_experts
    k = ids.shape[1]
    ranked = torch.bincount((ids * k + weight_ranks(chosen.weights)).flatten(), minlength=count * k)
    histogram = ranked.double().view(count, k)
    w = chosen.weights.double()
    return {
        "tokens": torch.tensor(float(ids.shape[0]), dtype=torch.float64),
        "count": histogram.sum(dim=1),
        "rank_histogram": histogram,
        "sum_w": _by_expert(ids, w, count),
        "sum_w2": _by_expert(ids, w.square(), count),
    } | _locality(ids, lengths, count)


def output_statistics(
    seen: Observation, sample: Sample, hidden_energy: Tensor, n_routed_experts: int
) -> Stats:
    """One layer on one batch: what the experts gave to the observed tokens.

    hidden_energy: float32 [S], squared norm of the residual stream after the layer.
    """
    ids, count = seen.expert_ids, n_routed_experts
    w, stands_for = seen.weights.double(), sample.weight[:, None]
    own = torch.diagonal(seen.gram, dim1=1, dim2=2).double()
    norm2 = own / w.square().clamp_min(1e-60)
    norm = norm2.sqrt()
    columns = {
        "observed_count": torch.ones_like(w),
        "sum_norm": norm,
        "sum_norm2": norm2,
        "sum_w_norm": w * norm,
        "energy": own,
    }
    stats = {name: _by_expert(ids, value * stands_for, count) for name, value in columns.items()}
    stats["observed"] = torch.tensor(float(ids.shape[0]), dtype=torch.float64)
    stats["max_norm"] = _maxima(ids, norm, count)
    stats["max_norm_first"] = _maxima(ids[sample.is_first], norm[sample.is_first], count)
    stats["hidden_energy"] = sample.weight @ hidden_energy.double()
    return stats | _grams(seen, sample.weight, hidden_energy)


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


def weight_ranks(weights: Tensor) -> Tensor:
    """int64 [T, K]: each choice's place in its token by weight, 0 the largest; of equals the first leads.

    Counting who is larger takes a sixth of the time of sorting twice.
    """
    columns = np.ascontiguousarray(weights.numpy().T)
    rank = np.zeros(columns.shape, dtype=np.int8)
    for r in range(1, len(columns)):
        leads = columns[:r] >= columns[r]
        rank[r] += leads.sum(axis=0, dtype=np.int8)
        rank[:r] += ~leads
    return torch.from_numpy(rank.T.astype(np.int64))


def by_rank(gram: Tensor, ranks: Tensor) -> Tensor:
    """gram [T, K, K] with both axes permuted by ranks [T, K]."""
    k = ranks.shape[1]
    pairs = (ranks[:, :, None] * k + ranks[:, None, :]).view(-1, k * k)
    return gram.view(-1, k * k).gather(1, pairs).view(-1, k, k)


def _by_expert(ids: Tensor, value: Tensor, count: int) -> Tensor:
    return torch.bincount(ids.flatten(), weights=value.flatten(), minlength=count)


def _maxima(ids: Tensor, value: Tensor, count: int) -> Tensor:
    zeros = torch.zeros(count, dtype=torch.float64)
    return zeros.scatter_reduce_(0, ids.flatten(), value.flatten(), "amax")


def _grams(seen: Observation, weight: Tensor, hidden_energy: Tensor) -> Stats:
    k = seen.weights.shape[1]
    ranked = by_rank(seen.gram, seen.weights.argsort(dim=1, descending=True, stable=True))
    relative = weight / hidden_energy.double().clamp_min(1e-30)
    own = torch.diagonal(ranked, dim1=1, dim2=2)
    bins = (own.clamp_min(1e-30).log2().floor() + GRAM_BIN_OFFSET).clamp_(0, GRAM_BINS - 1).long()
    bins += torch.arange(k) * GRAM_BINS
    in_bin = weight[:, None].expand(-1, k)
    histogram = torch.bincount(bins.flatten(), weights=in_bin.flatten(), minlength=k * GRAM_BINS)
    flat = ranked.double().view(-1, k * k)
    by_choice = seen.gram.double().view(-1, k * k)
    return {
        "gram_choice": (weight @ by_choice).view(k, k),
        "gram_weight": (weight @ flat).view(k, k),
        "gram_weight_rel": (relative @ flat).view(k, k),
        "gram_histogram": histogram.view(k, GRAM_BINS),
        "output_energy": weight @ by_choice.sum(dim=1),
    }


def _locality(ids: Tensor, lengths: Sequence[int], count: int) -> Stats:
    """Co-activation, reuse by the next token, and hits of LRU caches of experts, each window from empty."""
    num_tokens = ids.shape[0]
    starts = np.cumsum([0, *lengths[:-1]])
    chosen = torch.zeros(num_tokens, count).scatter_(1, ids, 1.0)
    again = (chosen[1:] * chosen[:-1]).sum(dim=1)
    again[starts[1:] - 1] = 0.0
    return {
        "coactivation": (chosen.T @ chosen).double(),
        "reuse_next": again.double().sum(),
        "lru_hits": _lru_hits(ids.numpy(), np.repeat(starts, lengths), count),
    }


def _lru_hits(ids: np.ndarray, window_start: np.ndarray, count: int) -> Tensor:
    """float64 [sizes]. A cache of n holds an expert if fewer than n were used since its own last use: if the
    n-th latest of the last uses is not later than its own."""
    num_tokens = len(ids)
    dtype = np.int16 if num_tokens < 1 << 15 else np.int32  # numpy sorts short integers with vectors
    used = np.full((num_tokens + 1, count), -1, dtype=dtype)
    used[np.arange(1, num_tokens + 1)[:, None], ids] = np.arange(num_tokens, dtype=dtype)[:, None]
    before = np.maximum.accumulate(used, axis=0)[:-1]
    last = np.take_along_axis(before, ids, axis=1)
    is_warm = last >= window_start[:, None]
    ordered = np.sort(before, axis=1)
    hits = [(is_warm & (ordered[:, [count - size]] <= last)).sum() for size in lru_sizes(count)]
    return torch.tensor(hits, dtype=torch.float64)
