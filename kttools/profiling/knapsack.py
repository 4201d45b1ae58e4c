"""Sharing experts out over the layers: minimise a sum of per-layer costs at a fixed total."""

import itertools
from collections.abc import Sequence

Costs = Sequence[Sequence[float]]


def allocate_exact(costs: Costs, total: int, k_min: int = 1) -> list[int]:
    """k per layer with sum(k) == total and the least sum of costs[l][k_l - 1]; dynamic programming.

    Raises ValueError when no such k exists.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for row in costs:
        grown: dict[int, tuple[float, list[int]]] = {}
        for used, (cost, ks) in best.items():
            for k in range(k_min, len(row) + 1):
                candidate = cost + row[k - 1]
                if used + k <= total and (used + k not in grown or candidate < grown[used + k][0]):
                    grown[used + k] = candidate, [*ks, k]
        best = grown
    if total not in best:
        raise ValueError(f"{total} experts cannot be shared out over {len(costs)} layers")
    return best[total][1]


def allocate_greedy(costs: Costs, total: int, k_min: int = 1) -> list[int]:
    """The same by giving the next expert to the layer it helps most: exact where costs are convex in k."""
    ks = [k_min] * len(costs)
    while sum(ks) < total:
        open_layers = [i for i, row in enumerate(costs) if ks[i] < len(row)]
        ks[max(open_layers, key=lambda i: costs[i][ks[i] - 1] - costs[i][ks[i]])] += 1
    return ks


def share_evenly(mean: float, num_layers: int) -> list[int]:
    """The same k for every layer; where the mean is no whole number, two neighbours in turn."""
    total = round(mean * num_layers)
    edges = [total * i // num_layers for i in range(num_layers + 1)]
    return [after - before for before, after in itertools.pairwise(edges)]
