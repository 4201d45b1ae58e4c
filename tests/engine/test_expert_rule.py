"""Expert tables in the native router against the same rules in torch: the same ids, the same bits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kttools_runtime import _kernels
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.expert_policy import FIXED_KINDS, KINDS, ORDERS, LayerPolicy
from kttools_runtime.routing import make_router
from tests.compare import assert_close
from tests.engine.test_steps import router_config

# kind, experts, groups, groups kept, native k, normalised: DeepSeek-V3, -V2, greedy, odd counts, k 1 and all
ROUTERS = [
    ("sigmoid_bias_groups", 256, 8, 4, 8, True),
    ("sigmoid_bias_groups", 64, 8, 4, 8, False),
    ("sigmoid_bias_groups", 21, 3, 2, 5, True),
    ("softmax_groups", 160, 8, 3, 6, False),
    ("softmax_groups", 60, 1, 1, 4, True),
    ("softmax_groups", 13, 1, 1, 13, True),
    ("softmax_groups", 9, 3, 1, 1, False),
]
THRESHOLDS = {"adaptive": (0.0, 0.05), "ser": (0.0, 1.0), "top_p": (0.0, 1.0)}


def random_policy(kind: str, experts: int, k: int, seed: int) -> LayerPolicy:
    """Any order, bounds, scale and protection, and now and then a threshold at the end of its range."""
    draw = np.random.default_rng([seed, experts, k])
    k_min = int(draw.integers(1, k + 1))
    low, high = THRESHOLDS.get(kind, (0.0, 0.0))
    threshold = float(draw.choice([low, high, *draw.uniform(low, high, 6)]))

    def numbers(count: int, low: float, high: float) -> Tensor:
        return torch.from_numpy(draw.uniform(low, high, count).astype(np.float32))

    return LayerPolicy(
        kind=kind,
        order=ORDERS[seed % 3],
        k=1 + seed % k,
        k_min=k_min,
        k_max=int(draw.integers(k_min, k + 1)),
        threshold=threshold,
        sigma=float(draw.uniform(0.3, 3.0)),
        alpha=numbers(k, 0.5, 1.5) if draw.integers(2) else None,
        ratios=numbers(k, 0.1, 1.0) if kind == "naee" else None,
        norms=numbers(experts, 0.2, 2.0),
        protect=torch.from_numpy(draw.random(experts) < 0.15) if draw.integers(2) else None,
        renormalize=bool(draw.integers(2)),
    )


class Routed:
    """A router with random weights, in torch and in C++, on 1 or 3 threads."""

    def __init__(self, kind: str, experts: int, groups: int, kept: int, k: int, normalise: bool) -> None:
        self.config = router_config(kind, experts, groups, kept, k, normalise)
        self.experts, self.k = experts, k
        generator = torch.Generator().manual_seed(experts + k)
        weight = torch.randn(experts, self.config.hidden_size, generator=generator)
        bias = torch.randn(experts, generator=generator) * 0.1 if kind == "sigmoid_bias_groups" else None
        self.torch = make_router(self.config, weight / self.config.hidden_size**0.5, bias)
        self.native = [self.torch.native(_kernels.Engine(threads)) for threads in (1, 3)]
        self.x = torch.randn(65, self.config.hidden_size, generator=generator)

    def run(self, x: Tensor, policy: LayerPolicy | None, native: Any) -> tuple[Tensor, Tensor, Tensor]:
        rule = None if policy is None else policy.native(self.experts, self.k)
        width = self.k if rule is None else rule.width
        ids, weights = torch.empty(len(x), width, dtype=torch.int64), torch.empty(len(x), width)
        scores = torch.empty(len(x), self.k)
        given = scores.numpy() if rule is None else None
        native.forward(x.numpy(), ids.numpy(), weights.numpy(), given, rule)
        return ids, weights, scores


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: f"{r[0][:7]}-{r[1]}-{r[4]}")
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_keeps_what_torch_keeps(router: tuple[Any, ...], kind: str) -> None:
    """Given the router's own choice: every bit. Beside torch's router: ids, and weights to a few units."""
    both = Routed(*router)
    counts: set[int] = set()
    for seed in range(24):
        policy = random_policy(kind, both.experts, both.k, seed)
        for rows in (1, 4, 65):
            x = both.x[:rows]
            expected_ids, expected = policy.select(*both.run(x, None, both.native[0]))
            for native in both.native:
                ids, weights, _ = both.run(x, policy, native)
                assert torch.equal(ids, expected_ids), (seed, rows)
                assert torch.equal(weights, expected), (seed, rows)
        counts |= set((ids >= 0).sum(dim=1).tolist())
        both.torch.table = policy
        torch_ids, torch_weights = both.torch(x)
        assert torch.equal(ids, torch_ids), seed
        # relative to the largest; a weight's own last bits differ by exp and sums in another order
        assert_close(weights, torch_weights, 2**-19)
    assert kind in FIXED_KINDS or len(counts) > min(both.k, 2) - 1  # else the rule chose nothing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_not_a_number_is_treated_alike(kind: str, order: str) -> None:
    """All scores of one token are NaN; that is seen in the result."""
    both = Routed(*ROUTERS[1])
    x = both.x[:5].clone()
    x[2, 3] = torch.nan
    policy = LayerPolicy(
        kind=kind,
        order=order,
        k=3,
        k_min=2,
        k_max=7,
        threshold=0.4,
        ratios=torch.linspace(0.9, 0.1, 8) if kind == "naee" else None,
        norms=torch.ones(64),
        renormalize=True,
    )
    expected_ids, expected = policy.select(*both.run(x, None, both.native[0]))
    ids, weights, _ = both.run(x, policy, both.native[0])
    assert torch.equal(ids, expected_ids)
    is_kept = ids >= 0  # what is dropped is never read
    assert torch.equal(weights.isnan() & is_kept, expected.isnan() & is_kept)
    assert bool((weights.isnan() & is_kept)[2].any())


def test_weights_that_are_all_nothing_stay_nothing() -> None:
    """Sigmoids of large negative logits are 0; renormalised they are no NaN."""
    config = router_config("sigmoid_bias_groups", 12, 3, 2, 4, False)
    router = make_router(config, torch.full((12, config.hidden_size), -100.0), torch.zeros(12))
    x = torch.ones(1, config.hidden_size)
    policy = LayerPolicy(kind="static", order="choice", k=2, renormalize=True)
    ids, weights = np.empty((1, 2), np.int64), np.full((1, 2), np.nan, np.float32)
    router.native(_kernels.Engine(1)).forward(x.numpy(), ids, weights, None, policy.native(12, 4))
    router.table = policy
    assert weights.tolist() == router(x)[1].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "static", "k": 0}, "k must be 1 or more, got 0"),
        ({"k_min": 0}, "expected 1 <= k_min <= k_max, got 0 and 8"),
        ({"k_max": 0}, "expected 1 <= k_min <= k_max, got 1 and 0"),
        ({"alpha": torch.ones(7)}, "alpha must have 8 numbers or more, got 7"),
        ({"norms": torch.ones(63)}, "norms must have 64 numbers, got 63"),
        ({"protect": torch.ones(65, dtype=torch.bool)}, "protect must have 64 numbers, got 65"),
        ({"kind": "naee"}, "ratios belong to kind naee"),
        ({"kind": "naee", "ratios": torch.ones(9)}, "ratios must have 8 numbers, got 9"),
        ({"ratios": torch.ones(8)}, "ratios belong to kind naee"),
        ({"kind": "best"}, "unknown kind best: expected one of uniform, static, adaptive"),
        ({"order": "size"}, "unknown order size: expected one of choice, weight, contribution"),
    ],
)
def test_rules_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"kind": "adaptive", "k_max": 8, **change}
    with pytest.raises(InvalidInputError, match=message):
        LayerPolicy(**given).native(64, 8)


def test_another_routers_rule_is_refused() -> None:
    both = Routed(*ROUTERS[1])
    policy = LayerPolicy(kind="static", k=2)
    for experts, choices in ((64, 6), (60, 8)):
        ids, weights = np.empty((65, 2), np.int64), np.empty((65, 2), np.float32)
        with pytest.raises(ValueError, match=rf"a rule for {choices} of {experts} experts.* 8 of 64"):
            both.native[0].forward(both.x.numpy(), ids, weights, None, policy.native(experts, choices))


def test_sizes_of_the_result_are_checked() -> None:
    both = Routed(*ROUTERS[1])
    rule = LayerPolicy(kind="static", k=2).native(64, 8)
    ids, weights = np.empty((65, 8), np.int64), np.empty((65, 8), np.float32)
    with pytest.raises(ValueError, match="ids has shape"):
        both.native[0].forward(both.x.numpy(), ids, weights, None, rule)
    with pytest.raises(ValueError, match="scores are the native choice's"):
        both.native[0].forward(both.x.numpy(), ids[:, :2].copy(), weights[:, :2].copy(), weights, rule)
