"""Pricing, forks, policies, tables and the bootstrap on the sample model."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import kttools_runtime as kt
from kttools.bundle.verify import verify_bundle
from kttools.profiling.bootstrap import Bootstrap, holm, interval
from kttools.profiling.install import install_table
from kttools.profiling.knapsack import allocate_exact, allocate_greedy
from kttools.profiling.layerwise import LayerRunner, Window, forward
from kttools.profiling.measure import Judge, compare_tokens
from kttools.profiling.policies import Baselines
from kttools.profiling.pricing import prefix_errors, prefix_scales
from kttools.profiling.sensitivity import fork_kl
from kttools.profiling.tables import table_document, write_table
from kttools_runtime.errors import CorruptFileError, InvalidInputError, UsageError
from kttools_runtime.expert_policy import LayerPolicy


def test_scales_are_the_best() -> None:
    generator = torch.Generator().manual_seed(4)
    root = torch.rand(8, 8, generator=generator, dtype=torch.float64)
    gram = root @ root.T
    scales = prefix_scales(gram)
    best = prefix_errors(gram)
    for factor in (0.99, 1.01):
        assert (prefix_errors(gram, scales * factor)[:7] >= best[:7]).all()
    assert scales[-1] == pytest.approx(1.0)


def test_allocation_equals_brute_force() -> None:
    generator = np.random.default_rng(5)
    for total in (6, 9, 14):
        costs = np.sort(generator.random((4, 5)), axis=1)[:, ::-1].tolist()
        every = (ks for ks in itertools.product(range(1, 6), repeat=4) if sum(ks) == total)

        def price(ks: tuple[int, ...] | list[int], costs: list[list[float]] = costs) -> float:
            return sum(row[k - 1] for row, k in zip(costs, ks, strict=True))

        assert price(allocate_exact(costs, total)) == pytest.approx(min(map(price, every)))
    convex = [[float(s) / k for k in range(1, 9)] for s in (1, 2, 5)]
    assert allocate_greedy(convex, 15) == allocate_exact(convex, 15)
    with pytest.raises(ValueError, match="cannot be shared out"):
        allocate_exact(convex, 99)


def test_forks_equal_a_patched_forward(runner: LayerRunner, texts: list[Window]) -> None:
    layer = runner.config.moe_layers[1]
    policy = LayerPolicy(kind="static", k=3)
    found = fork_kl(runner, texts[:3], {layer: [policy, None]})[layer]
    for column, window in enumerate(texts[:3]):
        full = forward(runner, window.token_ids, {})
        patched = forward(runner, window.token_ids, {layer: policy})
        kl = compare_tokens(runner, full, patched, window.token_ids).kl.mean(dtype=torch.float64)
        assert found[0, column] == float(kl)
        assert found[1, column] == 0.0


def test_forward_is_the_models(runner: LayerRunner, texts: list[Window]) -> None:
    ids = texts[0].token_ids
    assert torch.equal(runner.logits(forward(runner, ids, {})), runner.model.logits(ids))


@pytest.mark.parametrize("kind", ["adaptive", "ser", "top_p", "naee"])
def test_counting_rules_keep_a_prefix(kind: str) -> None:
    generator = torch.Generator().manual_seed(6)
    weights = torch.rand(40, 8, generator=generator)
    ids = torch.stack([torch.randperm(32, generator=generator)[:8] for _ in range(40)])
    ratios = torch.linspace(1, 0.5, 8) if kind == "naee" else None
    policy = LayerPolicy(
        kind=kind, threshold=0.6 if kind == "top_p" else 0.3, k_min=2, k_max=7, ratios=ratios
    )
    kept_ids, kept = policy.select(ids, weights, weights)
    count = (kept_ids >= 0).sum(dim=1)
    assert ((count >= 2) & (count <= 7)).all()
    assert len(count.unique()) > 1
    for row, n in enumerate(count.tolist()):
        expected = weights[row].sort(descending=True).values[:n]
        assert torch.equal(kept[row, :n], expected)
        assert not kept[row, n:].any()


def test_flat_k_equals_the_routers_own(nano_bundle: Path, runner: LayerRunner, texts: list[Window]) -> None:
    flat = Baselines(Judge(runner, texts[:1])).flat(5)
    native = kt.load(nano_bundle, threads=1, num_experts=5).logits(texts[0].token_ids)
    ours = runner.logits(forward(runner, texts[0].token_ids, flat))
    assert not (float((ours - native).abs().max()) > 0.05 * float(native.std()))


def test_table_round_trip_and_refusals(
    runner: LayerRunner, nano_bundle: Path, texts: list[Window], tmp_path: Path
) -> None:
    config = runner.config
    alpha = torch.linspace(1.2, 1.0, 8)
    policies = {
        i: LayerPolicy(kind="adaptive", sigma=2.0, threshold=0.05, k_max=8, alpha=alpha)
        for i in config.moe_layers
    }
    document = table_document(
        "t",
        runner.fingerprint,
        config,
        policies,
        k_mean_target=6.0,
        k_mean_expected={},
        placement={},
        provenance={},
    )
    path = tmp_path / "t.expert-table.json"
    write_table(path, document, config)
    model = kt.load(nano_bundle, threads=1, expert_table=path)
    ids = texts[0].token_ids
    assert torch.equal(model.logits(ids), runner.logits(forward(runner, ids, policies)))
    assert not torch.equal(model.logits(ids), runner.model.logits(ids))
    path.write_text(json.dumps(document | {"fingerprint": "0" * 64}))
    with pytest.raises(InvalidInputError, match="made for another model"):
        kt.load(nano_bundle, threads=1, expert_table=path)
    layers = document["policy"]["layers"]
    bad = [layers[0] | {"alpha": [1.0]}, *layers[1:]]
    path.write_text(json.dumps(document | {"policy": document["policy"] | {"layers": bad}}))
    with pytest.raises(CorruptFileError, match="expected 8 numbers"):
        kt.load(nano_bundle, threads=1, expert_table=path)
    with pytest.raises(InvalidInputError, match="no such expert table"):
        kt.load(nano_bundle, threads=1, expert_table=tmp_path / "none.json")
    with pytest.raises(UsageError, match="both given"):
        kt.load(nano_bundle, threads=1, expert_table=path, num_experts=4)


def test_bootstrap_and_holm() -> None:
    generator = np.random.default_rng(7)
    domains = ["a"] * 30 + ["b"] * 30
    tokens = np.full(60, 10.0)
    sums = generator.normal(1.0, 0.1, 60) * tokens
    found = interval(*Bootstrap(domains, 2000).ratio(sums, tokens))
    assert found.low < 1.0 < found.high
    assert found.high - found.low == pytest.approx(4 * 0.1 / 60**0.5, rel=0.3)
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_installed_table_is_the_default(
    nano_bundle: Path, runner: LayerRunner, texts: list[Window], tmp_path: Path
) -> None:
    policies = {i: LayerPolicy(kind="static", k=4) for i in runner.config.moe_layers}
    document = table_document(
        "t",
        runner.fingerprint,
        runner.config,
        policies,
        k_mean_target=4.0,
        k_mean_expected={},
        placement={},
        provenance={},
    )
    write_table(tmp_path / "t.json", document, runner.config)
    bundle = shutil.copytree(nano_bundle, tmp_path / "bundle")
    install_table(bundle, tmp_path / "t.json", runner.fingerprint)
    ids = texts[0].token_ids
    with_table = kt.load(bundle, threads=1)
    assert torch.equal(with_table.logits(ids), runner.logits(forward(runner, ids, policies)))
    without = kt.load(bundle, threads=1, expert_table="none")
    assert torch.equal(without.logits(ids), runner.model.logits(ids))
    assert verify_bundle(bundle).problems == []
