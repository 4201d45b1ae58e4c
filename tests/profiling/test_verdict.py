"""The certificate on made-up measurements: what passes, what must not, and what is kept of them on disk."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kttools.profiling.candidates import Candidate, Trials, paired_gain
from kttools.profiling.contest import COMPARED
from kttools.profiling.evaluate import Contender, Evaluation
from kttools.profiling.ingredients import PrefixNative
from kttools.profiling.knapsack import share_evenly
from kttools.profiling.layerwise import Policies, Window
from kttools.profiling.measure import DocumentSums, Measured
from kttools.profiling.measured_file import MeasuredFiles, policies_digest
from kttools_runtime.expert_policy import LayerPolicy

LAYERS, TOKENS, DOCUMENTS = (1, 2), 100, 12
DOMAINS = ("a", "b", "c")


def measured(kl: dict[str, float], k_mean: float = 6.0, seed: int = 0) -> Measured:
    """Documents of all domains around a mean KL each; k_mean experts in every layer."""
    noise = np.random.default_rng(seed)
    found = Measured()
    for domain, mean in kl.items():
        for number in range(DOCUMENTS):
            value = mean * TOKENS * float(noise.uniform(0.8, 1.2))
            sums = {"kl": value, "nll": 310.0 + value, "nll_full": 310.0, "top1": 95.0, "overlap": 97.0}
            found.documents.append(DocumentSums(domain, str(number), TOKENS, **sums))
        found.token_kl[domain] = [torch.full((TOKENS,), mean)]
        positions = DOCUMENTS * TOKENS
        found.positions[domain] = positions
        found.kept[domain] = dict.fromkeys(LAYERS, round(k_mean * positions))
    return found


def everywhere(kl: float) -> dict[str, float]:
    return dict.fromkeys(DOMAINS, kl)


def rule(k: int = 6) -> Policies:
    return {i: LayerPolicy(kind="static", k=k) for i in LAYERS}


def evaluation(table: Measured, **rivals: Measured) -> dict[str, Any]:
    others = {name: measured(everywhere(0.02), seed=1) for name in COMPARED}
    others |= {name.replace("_", "-"): value for name, value in rivals.items()}
    contenders = [Contender(name, name, rule(), value, True) for name, value in others.items()]
    contenders.append(Contender("static", "static table", rule(), table, False))
    judge: Any = SimpleNamespace(runner=SimpleNamespace(config=SimpleNamespace(num_experts_per_tok=8)))
    found = Evaluation(judge, contenders, 6.0)
    return found.document("static", {"data": {}}, COMPARED, None)


def test_a_table_that_is_better_everywhere_passes() -> None:
    document = evaluation(measured(everywhere(0.011)))
    assert document["verdict"] == {"pass": True, "reasons": [], "policy": "static"}
    flat = next(r for r in document["comparisons"] if r["against"] == "flat" and r["scope"] == "pooled")
    assert flat["ratio_low"] < 0.55 < flat["ratio_high"]
    alone = [r for r in document["comparisons"] if r["policy"] == "flat-alpha"]
    assert {r["scope"] for r in alone} == {"pooled", *DOMAINS}
    assert all(r["against"] == "flat" for r in alone)


@pytest.mark.parametrize(("k_mean", "is_fair"), [(6.02, True), (5.98, True), (6.021, False), (5.97, False)])
def test_the_realised_mean_is_part_of_the_verdict(k_mean: float, is_fair: bool) -> None:
    verdict = evaluation(measured(everywhere(0.011), k_mean))["verdict"]
    assert verdict["pass"] == is_fair
    assert is_fair or "the realised mean on the evaluation data is" in verdict["reasons"][0]


def test_a_rival_with_fewer_experts_is_no_comparison() -> None:
    verdict = evaluation(measured(everywhere(0.011)), ser=measured(everywhere(0.03), 5.5))["verdict"]
    assert verdict["reasons"] == ["ser ran with fewer experts (5.500): no fair comparison"]


def test_no_difference_does_not_pass() -> None:
    verdict = evaluation(measured(everywhere(0.0199), seed=2))["verdict"]
    assert any(reason.startswith("not surely below flat") for reason in verdict["reasons"])


def test_one_worse_domain_does_not_pass() -> None:
    verdict = evaluation(measured(everywhere(0.005) | {"b": 0.03}))["verdict"]
    assert "worse than flat on b" in verdict["reasons"]
    assert not any(reason.startswith("not surely below") for reason in verdict["reasons"])


def test_a_change_needs_a_significant_gain() -> None:
    trials = Trials(lambda line: None)
    best = Candidate("old", rule(), measured(everywhere(0.02)))
    clear = Candidate("clear", rule(), measured(everywhere(0.015)))
    noise = Candidate("noise", rule(), measured(everywhere(0.0199), seed=3))
    assert trials.better("x", best, noise) is best
    assert trials.better("x", best, clear) is clear
    assert [step["kept"] for step in trials.steps] == [False, True]
    gain, error = paired_gain(best.measured, clear.measured)
    assert gain == pytest.approx(0.005, rel=0.1)
    assert 0 < error < gain


WINDOWS = [Window("a", "1", torch.arange(TOKENS))]


def test_measurements_are_kept_and_found_again(tmp_path: Path) -> None:
    files = MeasuredFiles(tmp_path / "measured", "f" * 64, WINDOWS)
    written = measured({"a": 0.01, "b": 0.02})
    assert files.get(rule()) is None
    files.put(rule(), written)
    read = files.get(rule())
    assert read is not None
    assert read.documents == written.documents
    assert (read.kept, read.positions, read.seconds) == (written.kept, written.positions, written.seconds)
    assert all(torch.equal(torch.cat(read.token_kl[d]), torch.cat(written.token_kl[d])) for d in "ab")
    assert files.get(rule(5)) is None
    assert MeasuredFiles(tmp_path / "measured", "0" * 64, WINDOWS).get(rule()) is None
    other = [Window("a", "1", torch.arange(1, TOKENS + 1))]
    assert MeasuredFiles(tmp_path / "measured", "f" * 64, other).get(rule()) is None


def test_a_cut_measurement_is_made_again(tmp_path: Path) -> None:
    files = MeasuredFiles(tmp_path, "f" * 64, WINDOWS)
    files.put(rule(), measured({"a": 0.01}))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    assert files.get(rule()) is None


def test_a_rules_digest_sees_every_field() -> None:
    plain = LayerPolicy(kind="adaptive", threshold=0.1, alpha=torch.ones(8))
    others = [
        LayerPolicy(kind="adaptive", threshold=0.1),
        LayerPolicy(kind="adaptive", threshold=0.1, alpha=torch.full((8,), 1.0000001)),
        LayerPolicy(kind="adaptive", threshold=0.1, alpha=torch.ones(8), sigma=2.0),
        PrefixNative(kind="adaptive", threshold=0.1, alpha=torch.ones(8)),
    ]
    digests = {policies_digest({1: policy}) for policy in [plain, *others]}
    assert len(digests) == 5


def test_an_even_share_has_the_mean() -> None:
    assert share_evenly(6, 5) == [6] * 5
    assert share_evenly(6.5, 4) == [6, 7, 6, 7]
    assert sum(share_evenly(6.1, 58)) == round(6.1 * 58)


def test_first_tokens_stay_native() -> None:
    ids = torch.arange(8).repeat(6, 1)
    weights = torch.linspace(1, 0.1, 8).repeat(6, 1)
    kept, scaled = PrefixNative(kind="static", k=3, prefix_tokens=2).select(ids, weights, weights)
    assert (kept >= 0).sum(dim=1).tolist() == [8, 8, 3, 3, 3, 3]
    assert torch.equal(scaled[:2], weights[:2])
    assert torch.equal(scaled[2:, :3], weights[2:, :3])
