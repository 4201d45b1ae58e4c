"""The report's numbers against plain loops, its files against hostile names, and the page in one piece."""

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kttools.profiling.report import Facts, heat, pictures, render, svg, write_report
from kttools.profiling.report.facts import family, jensen_shannon
from kttools.profiling.report.verdict import tiles, verdict
from kttools_runtime.errors import InvalidInputError

LAYERS, EXPERTS, K = [1, 2, 3, 4, 5], 64, 8
DOMAINS = ["python", "c", "man", "prose", "zh"]


def make_profile(domains: list[str] = DOMAINS, layers: list[int] = LAYERS, experts: int = EXPERTS) -> Any:
    """A profile with specialised later layers, as a trained model has."""
    rng = np.random.default_rng(0)
    sizes = [1, 2, 4, 8, 16, 32, experts]
    base = rng.gamma(8.0, size=(len(layers), experts))
    stats = {}
    for _ in domains:
        depth = np.linspace(0.3, 1.2, len(layers))[:, None]
        share = base * np.exp(depth * rng.standard_normal((len(layers), experts)))
        count = np.rint(40000 * K * share / share.sum(-1, keepdims=True))
        tokens = np.full(len(layers), 40000.0)
        rate = (np.array(sizes) / experts) ** rng.uniform(0.45, 0.75)
        stats[domains[len(stats)]] = {
            "count": count,
            "tokens": tokens,
            "lru_hits": rate * K * tokens[:, None],
        }
    source = {"files": [{"name": "x.jsonl", "sha256": "ab" * 32, "bytes": 1, "rows": 2}]}
    header = {
        "model": {"name": "ds3-made-up"},
        "fingerprint": "f" * 64,
        "tool": {"name": "kttools", "version": "0.1"},
        "router": {"moe_layers": layers, "n_routed_experts": experts, "num_experts_per_tok": K},
        "domains": {d: {"documents": 40, "tokens": 40000, "provenance": source} for d in domains},
        "lru_sizes": sizes,
    }
    return SimpleNamespace(header=header, stats=stats)


def metrics(kl: float, wide: float = 0.1) -> dict[str, float]:
    return {
        "tokens": 120000,
        "kl_mean": kl,
        "kl_low": kl * (1 - wide),
        "kl_high": kl * (1 + wide),
        "kl_p99": kl * 12,
        "perplexity_ratio": 1 + kl / 3,
        "perplexity_ratio_low": 1 + kl / 4,
        "perplexity_ratio_high": 1 + kl / 2,
        "top1_agreement": 1 - 3 * kl,
        "overlap": 1 - 2 * kl,
    }


COSTS = {"flat-6": 0.0199, "flat-6-alpha": 0.0146, "ser": 0.0701, "top-p": 0.0148, "static": 0.0113}
TESTED = [*DOMAINS, "docs", "chat"]


def make_evaluation(is_pass: bool = True) -> dict[str, Any]:
    policies = [
        {
            "name": name,
            "label": f"{name} label",
            "k_mean": 6.02,
            "k_mean_by_layer": {str(n): 6.0 for n in LAYERS},
            "tokens_per_second": 5000.0,
            "metrics": {
                "pooled": metrics(kl),
                "domains": {d: metrics(kl * (1 + 0.1 * i)) for i, d in enumerate(TESTED)},
            },
        }
        for name, kl in COSTS.items()
    ]
    comparisons = []
    for against in ("flat-6", "flat-6-alpha", "ser"):
        for index, scope in enumerate(["pooled", *TESTED]):
            ratio = COSTS["static"] / COSTS[against] * (1 + 0.05 * index)
            low, high = ratio * 0.93, ratio * 1.08
            comparisons.append(
                {
                    "policy": "static",
                    "against": against,
                    "scope": scope,
                    "kl_difference": -0.01,
                    "low": -0.02,
                    "high": -0.005,
                    "ratio": ratio,
                    "ratio_low": low,
                    "ratio_high": high,
                    "is_worse": low > 1,
                    "is_better": high < 1,
                }
            )
    pareto = [
        {"policy": name, "k_mean": k, "kl_mean": kl, "kl_low": kl * 0.9, "kl_high": kl * 1.12, "label": name}
        for name, start in (
            ("static", 0.0113),
            ("flat", 0.0199),
            ("flat-alpha", 0.0146),
            ("ser", 0.06),
            ("top-p", 0.015),
        )
        for k in (7, 6, 5, 4, 3, 2)
        for kl in (start * math.exp(1.05 * (6 - k)),)
    ]
    return {
        "fingerprint": "f" * 64,
        "table": "static",
        "data": {d: {"documents": 20, "tokens": 17000, "profiled": d in DOMAINS} for d in TESTED},
        "policies": policies,
        "comparisons": comparisons,
        "pareto": pareto,
        "reference": {"k_mean": 8.0, "tokens_per_second": 4100.0},
        "bootstrap": {"replicates": 10000, "unit": "document"},
        "verdict": {"pass": is_pass, "reasons": [] if is_pass else ["zh is worse"], "policy": "static"},
    }


def make_table() -> dict[str, Any]:
    kept = (5, 5, 5, 7, 8)
    rng = np.random.default_rng(1)
    values = [float(v) for v in np.geomspace(0.003, 0.4, 14)]
    return {
        "name": "static",
        "fingerprint": "f" * 64,
        "policy": {
            "kind": "static",
            "layers": [{"layer": n, "k": k} for n, k in zip(LAYERS, kept, strict=True)],
        },
        "placement": {"gpu_hot_experts": {str(n): [3, 1, 2] for n in LAYERS}},
        "provenance": {
            "sensitivity": {
                "k0": 4,
                "layers": {str(n): {"d": 0.004 * 1.5**n, "standard_error": 0.0007 * n} for n in LAYERS},
            },
            "predicted": [
                {"k": [5] * 5, "kl_predicted": v, "kl_measured": v * float(rng.uniform(0.8, 1.3))}
                for v in values
            ],
        },
    }


def make_facts(is_pass: bool = True) -> Facts:
    return Facts(make_profile(), make_table(), make_evaluation(is_pass))


class Balance(HTMLParser):
    """Open and close tags match, and nothing points outside the file."""

    VOID = ("meta", "input", "br", "!doctype")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("href", "src", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(facts: Facts) -> str:
    return render(facts)["report.html"].decode("utf-8")


def test_the_page_is_whole_and_fetches_nothing() -> None:
    page = page_of(make_facts())
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert all(reference.startswith("data:") for reference in parser.references)
    assert "<script" not in page
    assert not re.search(r"url\(|@import|https?://", page)
    for picture in re.findall(r"<svg.*?</svg>", page, re.S):
        ET.fromstring(picture)
    for heading in (
        "What fewer experts cost",
        "Domain by domain",
        "Who does the work",
        "Locality",
        "GPU hot set",
    ):
        assert heading in page


def test_a_profile_alone_and_a_table_alone_have_a_report() -> None:
    alone = page_of(Facts(make_profile()))
    assert "nothing was evaluated" in alone
    assert "What fewer experts cost" not in alone
    assert "Who does the work" in alone
    assert "Not evaluated" in page_of(Facts(make_profile(), make_table()))


def test_hostile_names_are_escaped() -> None:
    name = '<script>alert("x")</script>'
    facts = Facts(make_profile([name, "b"]))
    facts.profile.header["model"]["name"] = name
    page = page_of(facts)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_same_facts_give_the_same_bytes() -> None:
    assert render(make_facts()) == render(make_facts())


@pytest.mark.parametrize(
    ("is_pass", "headline"), [(True, "Certificate: pass"), (False, "Certificate: NOT passed")]
)
def test_verdict_is_said_in_words(is_pass: bool, headline: str) -> None:
    found = verdict(make_facts(is_pass))
    text = " ".join(found.sentences)
    assert found.headline == headline
    assert "0.0113 [0.0102, 0.0124] nats" in text
    assert "Its KL is lower than that of flat-6 label at 6.02 experts: 0.568 of it" in text
    assert "2 of 7 test domains were never profiled: docs, chat." in text
    assert found.reasons == ([] if is_pass else ["zh is worse"])
    for word in ("lossless", "unchanged"):
        assert word not in text


def test_tiles_compare_with_flat_and_with_the_full_models_speed() -> None:
    shown = {tile.name: tile.value for tile in tiles(make_facts())}
    assert shown["KL against flat-6"] == "-43 %"
    assert shown["prefill speed of all experts"] == "1.22 x"


def test_summary_is_json_without_nan() -> None:
    document = json.loads(render(make_facts())["summary.json"])
    assert document["verdict"] == "pass"
    assert document["k_per_layer"] == {"1": 5.0, "2": 5.0, "3": 5.0, "4": 7.0, "5": 8.0}
    assert document["metrics"]["kl_mean"] == 0.0113
    assert set(document["domain_divergence_bits"]) == set(DOMAINS)


def test_markdown_has_every_policy() -> None:
    markdown = render(make_facts())["summary.md"].decode("utf-8")
    assert all(f"{name} label" in markdown for name in COSTS)
    assert "| static label (this table) | 6.02 | 0.0113 [0.0102, 0.0124] |" in markdown


def test_jensen_shannon_by_hand() -> None:
    p, q = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert jensen_shannon(p, q) == pytest.approx(1.0)
    assert jensen_shannon(p, p) == 0.0
    half = np.array([0.5, 0.5])
    expected = 0.5 * math.log2(1 / 0.75) + 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25))
    assert jensen_shannon(p, half) == pytest.approx(expected, rel=1e-12)


def test_load_and_coverage_by_loops() -> None:
    facts = Facts(make_profile(["a", "b"], [3, 4], 6))
    counts = [facts.profile.stats[d]["count"] for d in ("a", "b")]
    for row in range(2):
        average = [sum(c[row]) / 6 for c in counts]
        load = [(counts[0][row][e] / average[0] + counts[1][row][e] / average[1]) / 2 for e in range(6)]
        assert facts.pooled_load[row] == pytest.approx(load)
        busiest = sorted(load, reverse=True)
        assert facts.hot_coverage[row][2] == pytest.approx(sum(busiest[:2]) / 6)
    assert facts.hot_coverage[:, 0].tolist() == [0.0, 0.0]
    assert facts.hot_coverage[:, -1] == pytest.approx([1.0, 1.0])


def test_a_large_model_gets_a_picture_instead_of_rectangles() -> None:
    facts = Facts(make_profile(layers=list(range(3, 61)), experts=256))
    page = page_of(facts)
    assert "data:image/png;base64," in page
    assert len(page) < 2_000_000


def test_png_is_readable() -> None:
    image = pytest.importorskip("PIL.Image")
    import io

    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert np.array_equal(np.asarray(image.open(io.BytesIO(heat.png(pixels)))), pixels)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("flat-6", "flat"),
        ("flat-6-alpha", "flat-alpha"),
        ("flat-5.5-alpha", "flat-alpha"),
        ("top-p", "top-p"),
        ("top_p-0.8", "top-p"),
        ("static", "static"),
    ],
)
def test_families(policy: str, expected: str) -> None:
    assert family(policy) == expected


def test_ticks_are_round_and_inside() -> None:
    assert svg.linear_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert svg.log_ticks(0.004, 0.3) == pytest.approx([0.005, 0.01, 0.02, 0.05, 0.1, 0.2])


def test_broken_input_is_one_clear_line(tmp_path: Path) -> None:
    facts = make_facts()
    assert facts.evaluation is not None
    del facts.evaluation["policies"][0]["metrics"]["pooled"]["kl_mean"]
    with pytest.raises(InvalidInputError, match="lacks or breaks 'kl_mean'"):
        render(facts)


def test_a_directory_without_a_profile(tmp_path: Path) -> None:
    pytest.importorskip("kttools.profiling.profile_file")
    with pytest.raises(InvalidInputError, match="no such file; run"):
        write_report(tmp_path)


def test_pictures_where_matplotlib_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    assert pictures.write_pictures(make_facts(), tmp_path) == []
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: report)")
    written = pictures.write_pictures(make_facts(), tmp_path)
    assert {path.name for path in written} == {"pareto.png", "k-per-layer.png", "load.png", "similarity.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    # A profile alone has no policies to draw.
    alone = pictures.write_pictures(Facts(make_profile()), tmp_path)
    assert {path.name for path in alone} == {"load.png", "similarity.png"}
