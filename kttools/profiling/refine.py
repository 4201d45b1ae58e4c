"""Small changes to a table, kept while the paired gain on the probes' KL is significant."""

from .allocate import Allocator, Recipe
from .candidates import Candidate, Trials

# Candidates tried of each kind.
MOVES = 6
LAYERS = 8
STEPS = 3
FACTOR = 1.5


def refine_static(
    allocator: Allocator, trials: Trials, best: Candidate, recipe: Recipe
) -> tuple[Candidate, int]:
    """Moves one expert between two layers; returns how many moves were kept, too."""
    kept = 0
    for give, take in _moves(allocator, best)[:MOVES]:
        ks = [best.policies[i].k for i in allocator.layers]
        ks[give], ks[take] = ks[give] - 1, ks[take] + 1
        if min(ks) < 1 or max(ks) > allocator.native:
            continue
        policies = allocator.fixed(ks, recipe)
        moved = Candidate(f"k = {ks}", policies, allocator.judge.measure(policies), allocator.predicted(ks))
        found = trials.better("static refinement", best, moved)
        kept += found is not best
        best = found
    return best, kept


def refine_adaptive(
    allocator: Allocator, trials: Trials, best: Candidate, static: Candidate, recipe: Recipe, mean: float
) -> tuple[Candidate, int]:
    """Scales sigma of one layer after the other towards the static table's k, while that pays.

    The layers that keep the most more, or less, than the static table go first.
    """
    positions = sum(best.measured.positions.values())
    apart = {}
    for index, policy in static.policies.items():
        kept_here = sum(kept[index] for kept in best.measured.kept.values()) / positions
        apart[index] = kept_here - policy.k
    order = sorted(allocator.layers, key=lambda i: -abs(apart[i]))
    kept = 0
    for index in order[:LAYERS]:
        factor = 1 / FACTOR if apart[index] > 0 else FACTOR
        best, steps = _line_search(allocator, trials, best, recipe, mean, index, factor)
        kept += steps
    return best, kept


def _line_search(
    allocator: Allocator,
    trials: Trials,
    best: Candidate,
    recipe: Recipe,
    mean: float,
    index: int,
    factor: float,
) -> tuple[Candidate, int]:
    """One layer, one direction, until a step does not pay."""
    for step in range(STEPS):
        sigma = {i: p.sigma for i, p in best.policies.items()}
        sigma[index] *= factor
        policies, measured = allocator.calibrated(mean, allocator.judge, recipe, sigma)
        changed = Candidate(f"sigma of layer {index} x {factor:.2f}", policies, measured)
        found = trials.better("adaptive refinement", best, changed)
        if found is best:
            return best, step
        best = found
    return best, STEPS


def _moves(allocator: Allocator, best: Candidate) -> list[tuple[int, int]]:
    """(layer that gives, layer that takes), the least predicted loss first."""
    prices = allocator.prices()
    ks = [best.policies[i].k for i in allocator.layers]
    moves = []
    for give, k in enumerate(ks):
        for take, other in enumerate(ks):
            if give != take and k > 1 and other < allocator.native:
                loss = prices[give][k - 2] - prices[give][k - 1]
                gain = prices[take][other - 1] - prices[take][other]
                moves.append((float(loss - gain), give, take))
    return [(give, take) for _, give, take in sorted(moves)]
