"""The router against a plain loop, and the promises around it."""

import dataclasses

import numpy as np
import pytest
import torch

from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import UsageError
from kttools_runtime.routing import SigmoidGroupRouter, SoftmaxGroupRouter, make_router
from tests.compare import assert_close
from tests.oracle import CONFIGS, canonical_config, hf_model, runtime_model


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return canonical_config(hf_model(CONFIGS["base"]).config)


def router_for(config: ModelConfig, num_experts: int | None = None, seed: int = 3) -> SigmoidGroupRouter:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(config.n_routed_experts, config.hidden_size, generator=generator) / 8
    bias = 0.3 * torch.rand(config.n_routed_experts, generator=generator)
    return SigmoidGroupRouter(config, weight, bias, num_experts)


def inputs(config: ModelConfig, num_tokens: int = 50) -> torch.Tensor:
    return torch.randn(num_tokens, config.hidden_size, generator=torch.Generator().manual_seed(4))


def plain_route(router: SigmoidGroupRouter, x: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    """One token, by the words of the paper, in float64."""
    config = router.config
    scores = 1 / (1 + np.exp(-(router.weight.double().numpy() @ x.astype(np.float64))))
    biased = scores + router.bias.double().numpy()
    size = config.n_routed_experts // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    if config.n_group > 1:
        groups.sort(key=lambda group: -sum(sorted(biased[group])[-2:]))
    allowed = [expert for group in groups[: config.topk_group] for expert in group]
    chosen = sorted(allowed, key=lambda expert: -biased[expert])[:k]
    weights = scores[chosen]
    if config.norm_topk_prob:
        weights = weights / weights.sum()
    return chosen, list(weights * config.routed_scaling_factor)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"n_group": 1, "topk_group": 1},
        {"n_group": 8, "topk_group": 3},
        {"topk_group": 4},
        {"norm_topk_prob": False},
        {"routed_scaling_factor": 1.0, "num_experts_per_tok": 1},
    ],
)
@pytest.mark.parametrize("dropped", [0, 1])
def test_against_a_plain_loop(config: ModelConfig, change: dict[str, object], dropped: int) -> None:
    config = dataclasses.replace(config, **change)  # type: ignore[arg-type]
    k = max(config.num_experts_per_tok - dropped, 1)
    router = router_for(config, k)
    x = inputs(config)
    expert_ids, weights = router(x)
    assert expert_ids.dtype == torch.int64
    assert weights.dtype == torch.float32
    for row in range(len(x)):
        expected_ids, expected_weights = plain_route(router, x[row].numpy(), k)
        assert expert_ids[row].tolist() == expected_ids
        assert_close(weights[row], torch.tensor(expected_weights), 1e-5)


def test_bias_chooses_and_does_not_weigh(config: ModelConfig) -> None:
    config = dataclasses.replace(
        config, n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0
    )
    router = router_for(config)
    router.bias = torch.zeros_like(router.bias)
    router.bias[7] = 5.0
    x = inputs(config)
    expert_ids, weights = router(x)
    assert (expert_ids[:, 0] == 7).all()
    assert_close(weights[:, 0], torch.sigmoid(x @ router.weight[7]), 1e-5)


def test_negative_bias_never_brings_back_a_left_out_group(config: ModelConfig) -> None:
    """With every score below zero a mask of 0 (some engines) would choose the groups that lost."""
    router = router_for(config)
    shifted = router_for(config)
    shifted.bias = router.bias - 10.0
    x = inputs(config)
    assert torch.equal(router(x)[0], shifted(x)[0])


def test_fewer_experts_are_the_first_of_the_native_choice(config: ModelConfig) -> None:
    x = inputs(config)
    native, _ = router_for(config)(x)
    fewer, weights = router_for(config, 2)(x)
    assert torch.equal(fewer, native[:, :2])
    assert_close(weights.sum(-1), torch.full((len(x),), config.routed_scaling_factor), 1e-6)


def test_table_is_applied_to_the_native_result(config: ModelConfig) -> None:
    class KeepFirst:
        def select(
            self, ids: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            assert (scores.diff(dim=-1) <= 0).all()  # biased, best first
            dropped = ids.clone()
            dropped[:, 1:] = -1
            return dropped, weights

    router = router_for(config)
    x = inputs(config)
    native, native_weights = router(x)
    router.table = KeepFirst()
    expert_ids, weights = router(x)
    assert torch.equal(expert_ids[:, 0], native[:, 0])
    assert (expert_ids[:, 1:] == -1).all()
    assert torch.equal(weights, native_weights)


@pytest.mark.parametrize("num_experts", [0, 5, -1])
def test_impossible_num_experts(num_experts: int) -> None:
    with pytest.raises(UsageError, match=r"num_experts must be in 1\.\.4"):
        runtime_model(hf_model(CONFIGS["base"]), num_experts=num_experts)


def softmax_config(config: ModelConfig, **change: object) -> ModelConfig:
    changes = {"router": "softmax_groups", "num_experts_per_tok": 3, **change}
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def plain_softmax_route(router: SoftmaxGroupRouter, x: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    """One token: softmax over all, the groups with the best experts, the best of those, in float64."""
    config = router.config
    logits = router.weight.double().numpy() @ x.astype(np.float64)
    scores = np.exp(logits) / np.exp(logits).sum()
    size = config.n_routed_experts // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    groups.sort(key=lambda group: -max(scores[group]))
    allowed = [expert for group in groups[: config.topk_group] for expert in group]
    chosen = sorted(allowed, key=lambda expert: -scores[expert])[:k]
    weights = scores[chosen]
    if config.norm_topk_prob:
        weights = weights / weights.sum()
    return chosen, list(weights * config.routed_scaling_factor)


@pytest.mark.parametrize(
    "change",
    [
        {"n_group": 1, "topk_group": 1},
        {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 16.0},
        {"n_group": 16, "topk_group": 5},
        {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 8},
        {"n_group": 4, "topk_group": 4, "num_experts_per_tok": 1},
    ],
)
@pytest.mark.parametrize("dropped", [0, 1])
def test_softmax_against_a_plain_loop(config: ModelConfig, change: dict[str, object], dropped: int) -> None:
    config = softmax_config(config, **change)
    k = max(config.num_experts_per_tok - dropped, 1)
    router = make_router(config, router_for(config).weight, None, k)
    assert isinstance(router, SoftmaxGroupRouter)
    x = inputs(config)
    expert_ids, weights = router(x)
    for row in range(len(x)):
        expected_ids, expected_weights = plain_softmax_route(router, x[row].numpy(), k)
        assert expert_ids[row].tolist() == expected_ids
        assert_close(weights[row], torch.tensor(expected_weights), 1e-5)


def test_best_first_then_softmax_is_the_same_router(config: ModelConfig) -> None:
    """Mixtral's own words: the softmax over the best logits, which is ours normalised."""
    config = softmax_config(
        config, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.0, num_experts_per_tok=2
    )
    router = make_router(config, router_for(config).weight, None)
    x = inputs(config)
    expert_ids, weights = router(x)
    best = (x @ router.weight.T).topk(2, dim=-1)
    assert torch.equal(expert_ids, best.indices)
    assert_close(weights, best.values.softmax(dim=-1), 1e-5)
