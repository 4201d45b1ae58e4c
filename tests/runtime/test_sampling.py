"""Sampling: each filter against a plain definition, the order, determinism, and broken logits."""

import math

import pytest
import torch
from torch import Tensor

from kttools_runtime.errors import EngineError, UsageError
from kttools_runtime.sampling import Sampler, SamplingParams, candidates

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5])


def random_logits(vocab_size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def oracle(scores: Tensor, params: SamplingParams) -> dict[int, float]:
    """The filters as defined, with Python's own sorting."""
    probabilities = torch.softmax(scores.double() / params.temperature, -1).tolist()
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    kept = order[: params.top_k] if params.top_k else order
    mass = sum(probabilities[i] for i in kept)
    nucleus, total = [], 0.0
    for i in kept:
        if total >= params.top_p:
            break
        nucleus.append(i)
        total += probabilities[i] / mass
    floor = params.min_p * probabilities[order[0]]
    final = [i for i in nucleus if probabilities[i] >= floor]
    mass = sum(probabilities[i] for i in final)
    return {i: probabilities[i] / mass for i in final}


@pytest.mark.parametrize("vocab_size", [5, 300, 9000])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 1},
        {"top_k": 17},
        {"top_k": 10**6},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.3, "top_p": 0.95},
        {"temperature": 50.0, "top_p": 0.5},
    ],
    ids=str,
)
def test_candidates_are_those_of_the_definition(vocab_size: int, settings: dict[str, float]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **settings})
    scores = random_logits(vocab_size)
    probabilities, ids = candidates(scores, params)
    expected = oracle(scores, params)
    # f32 sums of up to 9000 terms may move the edge of the nucleus by a token of tiny mass
    difference = set(ids.tolist()) ^ set(expected)
    assert sum(expected.get(i, 1e-5) for i in difference) <= 1e-4
    for probability, i in zip(probabilities.tolist(), ids.tolist(), strict=True):
        assert math.isclose(probability, expected.get(i, probability), rel_tol=1e-3)
    assert math.isclose(float(probabilities.sum()), 1.0, rel_tol=1e-5)


def test_filters_equal_transformers() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    params = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
    scores, seen = random_logits(1000), [1, 5, 5, 999]
    sampler = Sampler(params, seen)
    probabilities, ids = candidates(sampler._penalised(scores), params)
    ours = torch.zeros(1000)
    ours[ids] = probabilities
    theirs = scores[None]
    for step in (
        process.RepetitionPenaltyLogitsProcessor(1.3),
        process.TemperatureLogitsWarper(0.7),
        process.TopKLogitsWarper(50),
        process.TopPLogitsWarper(0.9),
        process.MinPLogitsWarper(0.01),
    ):
        theirs = step(torch.tensor([seen]), theirs)
    torch.testing.assert_close(ours, torch.softmax(theirs[0], -1), rtol=1e-4, atol=1e-7)


def test_greedy_takes_the_peak() -> None:
    assert Sampler(SamplingParams()).sample(LOGITS) == 1
    assert Sampler(SamplingParams()).sample(LOGITS.bfloat16()) == 1


def test_repetition_penalty_moves_greedy_on() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    assert [sampler.sample(LOGITS) for _ in range(3)] == [1, 2, 1]
    assert Sampler(SamplingParams(repetition_penalty=2.0), history=[1]).sample(LOGITS) == 2


def test_repetition_penalty_lowers_negative_logits_too() -> None:
    scores = torch.tensor([-1.0, -1.5])
    assert Sampler(SamplingParams(repetition_penalty=2.0), history=[0]).sample(scores) == 1
    assert float(scores[0]) == -1.0, "the caller's logits must stay as they are"


def test_a_seed_repeats_and_another_differs() -> None:
    scores = random_logits(500, scale=1.0)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.sample(scores) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_frequencies_follow_the_probabilities() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1))
    draws = torch.tensor([sampler.sample(LOGITS) for _ in range(4000)])
    expected = torch.softmax(LOGITS, -1)
    counts = torch.bincount(draws, minlength=5) / 4000
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert bool(((counts - expected).abs() <= 5 * deviation).all())


def test_masked_tokens_are_never_drawn() -> None:
    scores = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.1])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3))
    assert {sampler.sample(scores) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([0.0, float("nan"), 1.0]), "NaN"),
        (torch.tensor([0.0, float("inf")]), "a maximum of inf"),
        (torch.full((4,), float("-inf")), "a maximum of -inf"),
        (torch.zeros(2, 3), r"shape \[2, 3\]"),
        (torch.zeros(0), r"shape \[0\]"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits(bad: Tensor, message: str, temperature: float) -> None:
    with pytest.raises(EngineError, match=message):
        Sampler(SamplingParams(temperature=temperature)).sample(bad)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 1 << 63),
    ],
)
def test_values_out_of_range(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} must be in"):
        SamplingParams(**{name: value})
