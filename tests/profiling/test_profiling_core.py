"""Recording, statistics, pricing, forks, allocation and merging on the sample model."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import kttools_runtime as kt
from kttools.bundle.verify import verify_bundle
from kttools.cli import main
from kttools.profiling import collect as collecting
from kttools.profiling.allocate import observe
from kttools.profiling.bootstrap import Bootstrap, holm, interval
from kttools.profiling.collect import Part, collect, limited, record
from kttools.profiling.data import Document
from kttools.profiling.install import install_table
from kttools.profiling.knapsack import allocate_exact, allocate_greedy
from kttools.profiling.layerwise import LayerRunner, Window, forward, windows
from kttools.profiling.measure import Judge, compare_tokens
from kttools.profiling.policies import Baselines
from kttools.profiling.pricing import errors, prefix_errors, prefix_scales
from kttools.profiling.probes import merge_probes, sample
from kttools.profiling.profile_file import merge, read_profile, read_shard
from kttools.profiling.recorder import recording
from kttools.profiling.sensitivity import fork_kl
from kttools.profiling.tables import table_document, write_table
from kttools_runtime.errors import CorruptFileError, InvalidInputError, UsageError
from kttools_runtime.expert_policy import LayerPolicy


@pytest.fixture(scope="module")
def runner(nano_bundle: Path) -> Iterator[LayerRunner]:
    before = torch.get_num_threads()
    yield LayerRunner(kt.load(nano_bundle, threads=1))
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts(runner: LayerRunner) -> list[Window]:
    generator = torch.Generator().manual_seed(1)
    documents = [
        Document("ab"[i % 2], f"f:{i}", torch.randint(5, 8000, (20 + i,), generator=generator).tolist())
        for i in range(12)
    ]
    return list(windows(documents, 64))


def test_recording_changes_only_rounding(runner: LayerRunner) -> None:
    layer = runner.config.moe_layers[0]
    moe = runner.moe(layer)
    assert moe is not None
    x = torch.randn(50, runner.config.hidden_size, generator=torch.Generator().manual_seed(2))
    plain = moe(x)
    with recording(moe) as recorder:
        recorded = moe(x)
    assert not (float((recorded - plain).abs().max()) > 1e-5 * float(plain.abs().max()))
    assert recorder.take().gram.shape == (50, 8, 8)
    with pytest.raises(AssertionError):
        recorder.take()


def test_gram_identity(runner: LayerRunner) -> None:
    """(1 - u)^T G (1 - u) is the squared error of running the engine with the weights u w."""
    layer = runner.config.moe_layers[-1]
    moe = runner.moe(layer)
    assert moe is not None
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, runner.config.hidden_size, generator=generator)
    ids, weights = moe.router(x)
    rows = x.to(moe.experts.input_dtype)
    with recording(moe) as recorder:
        moe.experts.layer.forward(rows, ids, weights)
    gram = recorder.take().gram.double()
    full = moe.experts.layer.forward(rows, ids, weights).double()
    for _ in range(5):
        u = torch.rand(ids.shape, generator=generator) * (torch.rand(ids.shape, generator=generator) > 0.4)
        reduced = moe.experts.layer.forward(rows, ids.masked_fill(u == 0, -1), weights * u).double()
        measured = (full - reduced).square().sum(dim=1)
        predicted = errors(gram, u.double())
        assert not (float(((measured - predicted).abs() / measured).max()) > 1e-4)


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


def _collect(runner: LayerRunner, texts: list[Window], where: Path, part: Part) -> None:
    for domain in "ab":
        own = [w for w in texts if w.domain == domain]
        collect(runner, domain, own, {}, where, window_tokens=64, model_name="nano", part=part)


def test_split_equals_whole(
    runner: LayerRunner, texts: list[Window], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "SHARD_TOKENS", 40)
    _collect(runner, texts, tmp_path / "whole", Part())
    for index in (1, 2, 3):
        _collect(runner, texts, tmp_path / f"part{index}", Part(index, 3))
    whole = sorted((tmp_path / "whole/shards").glob("*"))
    parts = sorted(tmp_path.glob("part*/shards/*"))
    assert len(whole) == len(parts) > 4
    merge(whole, tmp_path / "a")
    merge(reversed(parts), tmp_path / "b")
    for name in ("profile.expert-profile.json", "profile.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(InvalidInputError, match="is already there"):
        merge([*whole, parts[0]], tmp_path / "c")
    profile = read_profile(tmp_path / "a")
    assert profile.pooled()["tokens"][0] == sum(len(w.token_ids) for w in texts)
    assert (profile.pooled()["count"].sum(axis=1) == 8 * profile.pooled()["tokens"]).all()


def test_a_second_run_keeps_shards_and_refuses_other_text(
    runner: LayerRunner, texts: list[Window], tmp_path: Path
) -> None:
    own = [w for w in texts if w.domain == "a"]
    options = {"window_tokens": 64, "model_name": "nano"}
    first = collect(runner, "a", own, {}, tmp_path, **options)  # type: ignore[arg-type]
    again = collect(runner, "a", own, {}, tmp_path, **options)  # type: ignore[arg-type]
    assert (again.recorded_tokens, again.kept_tokens) == (0, first.recorded_tokens)
    with pytest.raises(InvalidInputError, match="another text_sha256"):
        collect(runner, "a", own[1:], {}, tmp_path, **options)  # type: ignore[arg-type]


def test_nan_and_cut_shards_are_refused(runner: LayerRunner, texts: list[Window], tmp_path: Path) -> None:
    _collect(runner, texts, tmp_path, Part())
    path = next((tmp_path / "shards").glob("a-*"))
    shard = read_shard(path)
    broken = shard.stats | {"sum_w": np.full_like(shard.stats["sum_w"], np.nan)}
    collecting.write_shard(path, dataclasses.replace(shard, stats=broken))
    with pytest.raises(CorruptFileError, match="sum_w holds values that are not finite"):
        read_shard(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptFileError, match="not a readable safetensors file"):
        merge([path], tmp_path / "out")


def test_probe_sample_does_not_depend_on_the_split(texts: list[Window]) -> None:
    whole = sample(texts)
    halves = merge_probes([sample(texts[6:]), sample(texts[:6])])
    assert all(np.array_equal(whole[name], halves[name]) for name in whole)


def test_limits(texts: list[Window]) -> None:
    documents = [Document("a", str(i), list(range(100))) for i in range(9)]
    found = list(limited(documents, 40, 100))
    assert [len(w.token_ids) for w in found] == [40, 40, 40]


def test_statistics_against_observations(runner: LayerRunner, texts: list[Window]) -> None:
    stats = record(runner, texts)
    seen = observe(runner, texts)[runner.config.moe_layers[0]]
    assert stats["sum_w"][0].sum() == pytest.approx(float(seen.weights.double().sum()))
    assert stats["output_energy"][0] == pytest.approx(float(seen.gram.double().sum()))
    assert stats["gram_weight"][0].sum() == pytest.approx(stats["gram_choice"][0].sum())
    assert np.array_equal(np.diagonal(stats["coactivation"][0]), stats["count"][0])
    assert (np.diff(stats["lru_hits"][0]) >= 0).all()


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


def test_command(
    nano_bundle: Path, samples_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    text = samples_dir / "text"
    data = [f"--data={d}=jsonl:{text / d}.jsonl#text" for d in ("python", "prose")]
    judged = [f"--eval={d}=jsonl:{text / d}.jsonl#text" for d in ("prose", "c")]
    limits = ["--tokens=1000", "--eval-tokens=600", "--window=128", "--mean-experts=6", "-t1", "--quiet"]
    code = main(["profile-experts", str(nano_bundle), *data, *judged, "-o", str(tmp_path), *limits, "--json"])
    torch.set_num_threads(before)
    assert code in (0, 6), capsys.readouterr().err
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"]["pass"] == (code == 0)
    kt.load(nano_bundle, threads=1, expert_table=tmp_path / "experts.expert-table.json")
    assert (tmp_path / "report.html").stat().st_size > 1000
    shutil.rmtree(tmp_path / "shards")


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
