"""What recording sees and counts, against plain loops and the engine itself."""

from collections import Counter

import numpy as np
import pytest
import torch

from kttools.profiling.layerwise import BATCH_TOKENS, LayerRunner, Window, batches, forward
from kttools.profiling.observe import observe
from kttools.profiling.observed import draw
from kttools.profiling.pricing import errors
from kttools.profiling.record import arrange, embed, record, run_layer
from kttools.profiling.recorder import Choices, Recorder, recording
from kttools.profiling.statistics import choice_statistics, lru_sizes, weight_ranks


def test_recording_changes_nothing(runner: LayerRunner, texts: list[Window]) -> None:
    """Recorded in batches, every window's hidden states are those of a plain pass, bit for bit."""
    hidden = embed(runner, texts)
    grouped = arrange(texts, hidden, 4)
    for index in range(runner.num_layers):
        run_layer(runner, index, grouped)
    assert torch.equal(hidden, torch.cat([forward(runner, w.token_ids, {}) for w in texts]))


def test_an_observation_is_handed_over_once(runner: LayerRunner) -> None:
    moe = runner.moe(runner.config.moe_layers[0])
    assert moe is not None
    x = torch.randn(50, runner.config.hidden_size, generator=torch.Generator().manual_seed(2))
    with recording(moe) as recorder:
        recorder.rows = torch.tensor([3, 40])
        moe(x)
    seen, chosen = recorder.take(), recorder.take_choices()
    assert seen.gram.shape == (2, 8, 8)
    assert torch.equal(chosen.expert_ids[[3, 40]], seen.expert_ids)
    for take in (recorder.take, recorder.take_choices):
        with pytest.raises(AssertionError):
            take()


def test_gram_identity(runner: LayerRunner) -> None:
    """(1 - u)^T G (1 - u) is the squared error of running the engine with the weights u w."""
    moe = runner.moe(runner.config.moe_layers[-1])
    assert moe is not None
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, runner.config.hidden_size, generator=generator)
    ids, weights = moe.router(x)
    rows = x.to(moe.experts.input_dtype)
    recorder = Recorder(moe.experts)
    recorder(x, ids, weights)
    gram = recorder.take().gram.double()
    full = moe.experts.layer.forward(rows, ids, weights).double()
    for _ in range(5):
        u = torch.rand(ids.shape, generator=generator) * (torch.rand(ids.shape, generator=generator) > 0.4)
        reduced = moe.experts.layer.forward(rows, ids.masked_fill(u == 0, -1), weights * u).double()
        measured = (full - reduced).square().sum(dim=1)
        predicted = errors(gram, u.double())
        assert not (float(((measured - predicted).abs() / measured).max()) > 1e-4)


def window(tokens: int, name: str = "f:0") -> Window:
    return Window("a", name, torch.arange(tokens))


@pytest.mark.parametrize("every", [1, 3, 8])
def test_every_token_is_stood_for(every: int) -> None:
    lengths = (2, 9, 30, 65)
    sample = draw([window(n, f"f:{n}") for n in lengths], every)
    start = 0
    for length in lengths:
        own = (sample.rows >= start) & (sample.rows < start + length)
        position, weight = sample.rows[own] - start, sample.weight[own]
        assert position[0] == 0
        assert weight[0] == 1
        assert float(weight.sum()) == length
        assert len(position) == 1 + -(-(length - 1) // every)
        strata = (position[1:] - 1) // every
        assert strata.tolist() == list(range(len(strata)))
        start += length
    assert sample.is_first.sum() == len(lengths)


def test_positions_are_drawn_evenly_and_for_ever() -> None:
    offsets = Counter[int]()
    for i in range(200):
        offsets.update(((draw([window(161, f"f:{i}")], 8).rows[1:] - 1) % 8).tolist())
    assert len(offsets) == 8
    assert min(offsets.values()) > 400  # of 500; the standard deviation is 21
    # Another draw would make shards of two versions of this program differ.
    assert draw([window(17)], 8).rows.tolist() == [0, 4, 10]


def test_a_sample_estimates_the_whole(runner: LayerRunner, texts: list[Window]) -> None:
    """Averaged over many draws (documents renamed), the estimate is the full sum; choices are exact."""
    whole = record(runner, texts, gram_every=1)
    found = []
    for i in range(24):
        renamed = [Window(w.domain, f"{i}:{w.document}", w.token_ids) for w in texts]
        found.append(record(runner, renamed, gram_every=4))
    for name in ("tokens", "count", "rank_histogram", "sum_w", "coactivation", "lru_hits", "max_norm_first"):
        assert all(np.array_equal(one[name], whole[name]) for one in found), name
    for name in ("sum_norm2", "energy", "gram_weight", "gram_choice", "gram_weight_rel", "output_energy"):
        totals = np.array([one[name].sum() for one in found]) / whole[name].sum()
        standard_error = totals.std(ddof=1) / len(totals) ** 0.5
        assert not (abs(totals.mean() - 1) > 4 * standard_error), name
        assert not (standard_error > 0.02), name
    tokens = sum(len(w.token_ids) for w in texts)
    for one in found:
        assert one["observed_count"][0].sum() == 8 * tokens
        assert one["observed"][0] < 0.4 * tokens
        assert (one["max_norm"] <= whole["max_norm"]).all()


def test_statistics_against_observations(runner: LayerRunner, texts: list[Window]) -> None:
    stats = record(runner, texts, gram_every=1)
    seen = observe(runner, texts)[runner.config.moe_layers[0]]
    assert stats["observed"][0] == stats["tokens"][0] == len(seen.weights)
    assert np.array_equal(stats["observed_count"], stats["count"])
    assert stats["sum_w"][0].sum() == pytest.approx(float(seen.weights.double().sum()))
    assert stats["output_energy"][0] == pytest.approx(float(seen.gram.double().sum()))
    assert stats["gram_weight"][0].sum() == pytest.approx(stats["gram_choice"][0].sum())
    assert stats["gram_histogram"][0].sum() == 8 * len(seen.weights)
    assert np.array_equal(np.diagonal(stats["coactivation"][0]), stats["count"][0])


def test_choices_against_a_plain_loop() -> None:
    """Ranks, reuse and LRU caches counted one token at a time."""
    generator = torch.Generator().manual_seed(9)
    experts, k, lengths = 16, 4, [7, 30, 1, 12]
    popular = torch.rand(sum(lengths), experts, generator=generator) + torch.linspace(0, 1, experts)
    ids = popular.topk(k).indices
    weights = (torch.rand(ids.shape, generator=generator) * 4).round() / 4  # ties
    stats = choice_statistics(Choices(ids, weights), lengths, experts)
    hits, reuse, histogram = Counter[int](), 0, np.zeros((experts, k))
    start = 0
    for length in lengths:
        used: list[int] = []  # the most recently used token's experts first
        when: dict[int, int] = {}
        for t in range(start, start + length):
            row = ids[t].tolist()
            for expert in row:
                if expert in when:
                    younger = sum(time > when[expert] for time in when.values())
                    hits.update(size for size in lru_sizes(experts) if younger < size)
            reuse += len(set(row) & set(used))
            used = row
            when |= dict.fromkeys(row, t)
            order = sorted(range(k), key=lambda r: (-weights[t, r].item(), r))
            for rank, r in enumerate(order):
                histogram[row[r], rank] += 1
        start += length
    assert stats["lru_hits"].tolist() == [hits[size] for size in lru_sizes(experts)]
    assert stats["reuse_next"] == reuse
    assert np.array_equal(stats["rank_histogram"].numpy(), histogram)
    assert 0 < hits[lru_sizes(experts)[0]] < hits[lru_sizes(experts)[-1]]


def test_ranks_are_a_stable_sort() -> None:
    weights = torch.randint(0, 4, (300, 8), generator=torch.Generator().manual_seed(4)).float()
    expected = weights.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    assert torch.equal(weight_ranks(weights), expected)


def test_batches_hold_whole_windows_in_order() -> None:
    sizes = [1000, 1000, 100, BATCH_TOKENS, 5, BATCH_TOKENS + 9, 3]
    found = list(batches([window(n) for n in sizes]))
    assert [[len(w.token_ids) for w in batch] for batch in found] == [
        [1000, 1000],
        [100],
        [BATCH_TOKENS],
        [5],
        [BATCH_TOKENS + 9],
        [3],
    ]
