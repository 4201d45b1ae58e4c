"""The rank Gram prices every policy: its layer error equals running the engine again under that policy."""

import pytest
import torch
from torch import Tensor

from kttools.profiling.layerwise import LayerRunner
from kttools.profiling.pricing import errors
from kttools.profiling.recorder import Recorder
from kttools_runtime.expert_policy import LayerPolicy

K, TOKENS = 8, 150


def random_policy(seed: int) -> LayerPolicy:
    """Any kind, order, bounds, scale and protection."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    kind = ("static", "adaptive", "ser", "top_p", "naee")[seed % 5]
    thresholds = {"adaptive": number(0.01, 0.3), "ser": number(0.6, 1.0), "top_p": number(0.3, 0.9)}
    k_min = integer(1, 3)
    return LayerPolicy(
        kind=kind,
        order=("choice", "weight", "contribution")[integer(0, 2)],
        k=integer(1, K - 1),
        k_min=k_min,
        k_max=integer(k_min, K - 1),
        threshold=thresholds.get(kind, 0.0),
        sigma=number(0.5, 2.0),
        alpha=torch.rand(K, generator=draw) + 0.5 if integer(0, 1) else None,
        ratios=torch.linspace(1.0, number(0.2, 0.9), K) if kind == "naee" else None,
        norms=torch.rand(32, generator=draw) + 0.5,
        protect=torch.rand(32, generator=draw) < 0.1 if integer(0, 1) else None,
        renormalize=bool(integer(0, 1)),
    )


def multipliers(ids: Tensor, weights: Tensor, kept_ids: Tensor, kept_weights: Tensor) -> Tensor:
    """u [T, K] of the native choices, from what a policy kept of them."""
    is_same = (ids[:, :, None] == kept_ids[:, None, :]) & (kept_ids[:, None, :] >= 0)
    return (is_same * kept_weights.double()[:, None, :]).sum(dim=2) / weights.double()


@pytest.mark.parametrize("seed", range(20))
def test_predicted_error_is_the_error(runner: LayerRunner, seed: int) -> None:
    moe = runner.moe(runner.config.moe_layers[seed % 3])
    assert moe is not None
    x = torch.randn(TOKENS, runner.config.hidden_size, generator=torch.Generator().manual_seed(100 + seed))
    seen: list[tuple[Tensor, ...]] = []

    class Spy:
        def select(self, ids: Tensor, weights: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
            seen.append((ids.clone(), weights.clone(), scores.clone()))
            return ids, weights

    moe.router.table = Spy()
    try:
        moe.router(x)
    finally:
        moe.router.table = None
    ((ids, weights, scores),) = seen
    rows = x.to(moe.experts.input_dtype)
    recorder = Recorder(moe.experts)
    recorder(x, ids, weights)
    gram = recorder.take().gram.double()
    kept_ids, kept_weights = random_policy(seed).select(ids, weights, scores)
    u = multipliers(ids, weights, kept_ids, kept_weights)
    assert bool((u == 0).any())
    full = moe.experts.layer.forward(rows, ids, weights).double()
    reduced = moe.experts.layer.forward(rows, kept_ids, kept_weights).double()
    measured = (full - reduced).square().sum(dim=1)
    off = (measured - errors(gram, u)).abs() / measured
    assert not (float(off.max()) > 1e-4)
