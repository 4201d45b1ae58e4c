"""Tables and plain policies judged without a profile: against plain torch, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kttools.cli import main
from kttools.profiling.data_spec import parse_spec
from kttools.profiling.gather import TextLimits, domain_windows, open_runner
from kttools.profiling.judge_any import judge_any
from kttools.profiling.layerwise import LayerRunner, forward
from kttools.profiling.plain_policies import parse_plain
from kttools_runtime.errors import UsageError

from .test_schemas import check

REPO = Path(__file__).resolve().parents[2]
STATIC = REPO / "profiles" / "ds3-nano-6-static.expert-table.json"
TEXTS = ["flat:6", "flat:8", "ser:5:0.73", "top-p:0.8", "flat-alpha:6:0.9"]
LIMITS = TextLimits(64, 300)
Found = tuple[dict[str, Any], list[str], Path]


def specs(samples_dir: Path) -> list[str]:
    return [f"{d}=jsonl:{samples_dir / 'text' / d}.jsonl#text" for d in ("c", "zh")]


@pytest.fixture(scope="module")
def found(
    runner: LayerRunner, nano_bundle: Path, samples_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Found:
    output = tmp_path_factory.mktemp("judged")
    said: list[str] = []
    tables = ["ds3-nano-6-adaptive", str(STATIC)]
    plain = [parse_plain(text) for text in TEXTS]
    judged = judge_any(
        runner, nano_bundle, specs(samples_dir), output, LIMITS, tables, plain, None, said.append
    )
    return judged, said, output


def named(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(p for p in document["policies"] if p["name"] == name)


def test_what_is_written_follows_the_schema(found: Found) -> None:
    document, _, output = found
    written = json.loads((output / "evaluation.json").read_text())
    check("expert-evaluation", written)
    assert written["policies"] == document["policies"]
    assert [p["name"] for p in written["policies"]] == ["ds3-nano-6-adaptive", "ds3-nano-6-static", *TEXTS]
    assert [p["is_baseline"] for p in written["policies"]] == [False, False, *[True] * 5]
    assert written["data"]["c"]["profiled"] is None
    summary = (output / "summary.md").read_text()
    assert all(p["label"] in summary for p in written["policies"])


def test_the_full_models_own_k_loses_nothing(found: Found) -> None:
    metrics = named(found[0], "flat:8")["metrics"]["pooled"]
    assert named(found[0], "flat:8")["k_mean"] == 8
    assert metrics["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert metrics["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["top1_agreement"] == metrics["top1_agreement_high"] == 1
    assert metrics["overlap"] == pytest.approx(1, abs=1e-4)


def test_the_numbers_of_flat_6_are_those_of_plain_torch(
    found: Found, runner: LayerRunner, samples_dir: Path
) -> None:
    """Six weights renormalised by hand; KL and overlap of float64 softmaxes, token by token."""

    class First6:
        def select(self, ids: Any, weights: Any, scores: Any) -> tuple[Any, Any]:
            kept = weights[:, :6]
            # An ulp more would change some token's int8 rounding, and with it the 99th percentile.
            return ids[:, :6].contiguous(), kept * (weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True))

    kl, overlap, nll = [], [], []
    rules: Any = dict.fromkeys(runner.config.moe_layers, First6())
    for spec in specs(samples_dir):
        for window in domain_windows(runner, parse_spec(spec), LIMITS):
            ids = window.token_ids
            p, q = (
                runner.logits(forward(runner, ids, rule))[:-1].double().softmax(1) for rule in ({}, rules)
            )
            kl.append((p * (p / q).log()).sum(1))
            overlap.append(torch.minimum(p, q).sum(1))
            nll.append((p / q).log().gather(1, ids[1:, None])[:, 0])
    metrics = named(found[0], "flat:6")["metrics"]["pooled"]
    assert metrics["tokens"] == sum(map(len, kl))
    assert metrics["kl_mean"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert metrics["kl_p99"] == pytest.approx(float(torch.cat(kl).quantile(0.99)), rel=1e-4)
    assert metrics["overlap"] == pytest.approx(float(torch.cat(overlap).mean()), rel=1e-4)
    assert metrics["perplexity_ratio"] == pytest.approx(float(torch.cat(nll).mean().exp()), rel=1e-4)
    assert metrics["kl_low"] < metrics["kl_mean"] < metrics["kl_high"]
    assert metrics["overlap_low"] < metrics["overlap"] < metrics["overlap_high"]


def test_equal_means_are_compared_and_others_are_not(found: Found) -> None:
    document, said, _ = found
    pairs = {(row["policy"], row["against"]) for row in document["comparisons"]}
    assert pairs == {("ds3-nano-6-static", "flat:6"), ("flat-alpha:6:0.9", "flat:6")}
    assert {row["scope"] for row in document["comparisons"]} == {"pooled", "c", "zh"}
    row = document["comparisons"][0]
    difference = [named(document, n)["metrics"]["pooled"]["kl_mean"] for n in (row["policy"], "flat:6")]
    assert row["kl_difference"] == pytest.approx(difference[0] - difference[1])
    assert any("adaptive: compared with no flat k" in line for line in said)


def test_thresholds_drop_more_experts_the_stricter_they_are(
    runner: LayerRunner, nano_bundle: Path, samples_dir: Path, tmp_path: Path
) -> None:
    texts = ["ser:1:0", "ser:1:0.6", "ser:1:1", "top-p:1", "top-p:0.5", "flat:5.5", "flat:8"]
    plain = [parse_plain(text) for text in texts]
    document = judge_any(runner, nano_bundle, specs(samples_dir)[:1], tmp_path, LIMITS, [], plain)
    means = [p["k_mean"] for p in document["policies"]]
    assert means[0] == 8 > means[1] > means[2] >= 1
    assert means[3] > means[4] >= 1
    assert document["comparisons"] == []  # flat:8 is the full model: its KL of zero divides nothing
    assert means[5] == pytest.approx(5.5, abs=1 / (2 * len(runner.config.moe_layers)) + 1e-9)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("magic:6", "unknown kind"),
        ("flat", "expected flat:K"),
        ("flat-alpha:6", "scales fitted to each layer need a profile"),
        ("flat:x", "expected a number from 1"),
        ("flat:nan", "expected a number from 1"),
        ("ser:2.5:0.8", "expected a whole number"),
        ("ser:5:1.5", "from 0 to 1"),
        ("top-p:-1", "from 0 to 1"),
        ("flat-alpha:6:inf", "A: expected a number"),
    ],
)
def test_faulty_policies_are_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_plain(text)


def evaluate(bundle: Path, samples_dir: Path, *arguments: object) -> int:
    text = f"--eval={specs(samples_dir)[0]}"
    small = ("--eval-tokens=200", "--window=64", "-t1", "--quiet")
    return main(["profile-experts", "evaluate", *map(str, (bundle, text, *small, *arguments))])


def test_the_command_and_its_floor(
    nano_bundle: Path, samples_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (f"--table={STATIC}", "--policies=flat:6,top-p:0.8", "-o", tmp_path / "out")
    assert evaluate(nano_bundle, samples_dir, *asked, "--max-kl=0.5", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in output["policies"]] == ["ds3-nano-6-static", "flat:6", "top-p:0.8"]
    assert output["comparisons"][0]["against"] == "flat:6"
    assert output["floor"] == {"max_kl": 0.5, "pass": True, "reasons": []}
    assert evaluate(nano_bundle, samples_dir, *asked, "--max-kl=0.0001") == 6
    printed = capsys.readouterr()
    assert "flat top-6, renormalised" in printed.out
    assert "ds3-nano-6-static: mean KL" in printed.err


def test_what_the_command_refuses(
    nano_bundle: Path, samples_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads(STATIC.read_text()) | {"fingerprint": "0" * 64}
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "profiled").mkdir()
    (tmp_path / "profiled" / "profile.expert-profile.json").write_text("{}")
    table, out = f"--table={STATIC}", ("-o", tmp_path / "out")
    for code, message, arguments in (
        (3, "made for another model", (f"--table={tmp_path / 'other.json'}", *out)),
        (3, "no such expert table", ("--table=nothing", *out)),
        (2, "the full model is what", ("--table=none", *out)),
        (2, "are called 'ds3-nano-6-static'", (table, "--table=ds3-nano-6-static", *out)),
        (2, "expected 1 to 8 experts", ("--policies=flat:9", *out)),
        (2, "unknown kind", ("--policies=flat:6,magic", *out)),
        (2, "--mean-experts is for the table of a profile", (table, "--mean-experts=5", *out)),
        (2, "holds a profile", (table, "-o", tmp_path / "profiled")),
    ):
        assert evaluate(nano_bundle, samples_dir, *arguments) == code, message
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_bundle_opened_again_finds_what_was_measured(
    found: Found, nano_bundle: Path, samples_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    document, _, output = found
    monkeypatch.setattr("kttools.profiling.measure.Judge._measure", refuse)
    again = judge_any(
        open_runner(nano_bundle, 1, None), nano_bundle, specs(samples_dir), output, LIMITS,
        ["ds3-nano-6-adaptive", str(STATIC)], [parse_plain(text) for text in TEXTS],
    )  # fmt: skip
    assert again["comparisons"] == document["comparisons"]
