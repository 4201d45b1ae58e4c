"""The certificate in plain words: numbers with their intervals, no adjectives they do not carry."""

from dataclasses import dataclass
from typing import Any

from .facts import Facts, family, number


@dataclass(frozen=True, slots=True)
class Verdict:
    """state: pass, fail, or none when nothing was evaluated."""

    state: str
    headline: str
    sentences: list[str]
    reasons: list[str]


def verdict(facts: Facts) -> Verdict:
    judged, evaluation = facts.judged, facts.evaluation
    if judged is None or evaluation is None:
        return Verdict(
            "none",
            "Not evaluated",
            ["Nothing here says what this table costs: run `kttools profile-experts evaluate` first."]
            if facts.table
            else ["This is a profile alone: no table was made from it, and nothing was evaluated."],
            [],
        )
    found = evaluation.get("verdict", {})
    state = "pass" if found.get("pass") else "fail"
    headline = "Certificate: pass" if state == "pass" else "Certificate: NOT passed"
    return Verdict(state, headline, _sentences(facts, judged), [str(r) for r in found.get("reasons", [])])


def _sentences(facts: Facts, judged: dict[str, Any]) -> list[str]:
    out = [_cost(facts, judged)]
    out += [line for rival in facts.rivals if (line := _against(facts, rival))]
    out += _alpha_alone(facts) + _calibration(facts, judged)
    out += _domains(facts, judged)
    return out


def _cost(facts: Facts, judged: dict[str, Any]) -> str:
    m = judged["metrics"]["pooled"]
    sentence = (
        f"With {judged['k_mean']:.2f} instead of {facts.k_native} experts per token, the distribution over "
        f"the next token moves by {_interval(m, 'kl')} nats of KL on average over {m['tokens']:,} test tokens"
    )
    parts = []
    if m.get("top1_agreement") is not None:
        parts.append(f"the most likely token stays the same for {m['top1_agreement']:.2%}")
    if m.get("perplexity_ratio") is not None:
        parts.append(f"perplexity is multiplied by {_interval(m, 'perplexity_ratio')}")
    return f"{'; '.join([sentence, *parts])}."


def _against(facts: Facts, rival: str) -> str:
    row, other = facts.comparison(rival), facts.policy(rival)
    if row is None or other is None or row.get("ratio") is None:
        return ""
    word = (
        "lower than"
        if row.get("is_better")
        else "higher than"
        if row.get("is_worse")
        else "not different from"
    )
    sentence = f"Its KL is {word} that of {other.get('label') or rival} at {other['k_mean']:.2f} experts"
    low, high = number(row.get("ratio_low")), number(row.get("ratio_high"))
    return f"{sentence}: {row['ratio']:.3f} of it, 95 % interval {low:.3f} to {high:.3f}."


def _alpha_alone(facts: Facts) -> list[str]:
    """What rescaling gives without a profile's choice of layers or tokens."""
    flat = facts.flat_rival
    row = facts.comparison(flat, policy="flat-alpha") if flat else None
    if row is None or row.get("ratio") is None:
        return []
    low, high = number(row.get("ratio_low")), number(row.get("ratio_high"))
    return [
        f"Rescaling the kept weights alone (flat k + alpha) gives {row['ratio']:.3f} of flat k's KL, "
        f"95 % interval {low:.3f} to {high:.3f}."
    ]


def _calibration(facts: Facts, judged: dict[str, Any]) -> list[str]:
    found = ((facts.evaluation or {}).get("calibration") or {}).get(judged["name"])
    if not found:
        return []
    return [
        f"Its threshold was set on the routing of this test text (not on its KL). As made from the probe "
        f"documents it keeps {found['k_mean_from_probes']:.3f} experts here, at a KL of "
        f"{found['kl_from_probes']:.4f}."
    ]


def _domains(facts: Facts, judged: dict[str, Any]) -> list[str]:
    data = (facts.evaluation or {}).get("data", {})
    unseen = [d for d in judged["metrics"]["domains"] if not data.get(d, {}).get("profiled")]
    out = []
    if unseen:
        out.append(f"{len(unseen)} of {len(data)} test domains were never profiled: {', '.join(unseen)}.")
    flat = facts.flat_rival
    rows = [(d, facts.comparison(flat, d)) for d in judged["metrics"]["domains"]] if flat else []
    worse = [d for d, row in rows if row and row.get("is_worse")]
    if worse:
        out.append(f"It is significantly worse than {flat} in: {', '.join(worse)}.")
    elif rows:
        out.append(f"It is significantly worse than {flat} in no domain.")
    return out


def _interval(metrics: dict[str, Any], name: str) -> str:
    """`0.0113 [0.0104, 0.0123]`; the keys of a metric's mean differ only by suffix."""
    mean = metrics.get(f"{name}_mean", metrics.get(name))
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return f"{mean:.4f}" if low is None or high is None else f"{mean:.4f} [{low:.4f}, {high:.4f}]"


@dataclass(frozen=True, slots=True)
class Tile:
    """One number at the head of the page."""

    value: str
    name: str
    note: str = ""


def tiles(facts: Facts) -> list[Tile]:
    judged = facts.judged
    if judged is None:
        tokens = sum(int(d["tokens"]) for d in facts.profile.header["domains"].values())
        return [
            Tile(f"{tokens:,}", "tokens profiled"),
            Tile(str(len(facts.domains)), "domains"),
            Tile(f"{facts.imbalance.max():.2f}", "busiest / average expert"),
        ]
    m = judged["metrics"]["pooled"]
    out = [
        Tile(f"{judged['k_mean']:.2f}", "experts per token", f"of {facts.k_native}"),
        Tile(f"{m['kl_mean']:.4f}", "mean KL, nats", f"95 %: {m['kl_low']:.4f} to {m['kl_high']:.4f}"),
    ]
    flat = facts.flat_rival
    row = facts.comparison(flat) if flat else None
    if row and row.get("ratio") is not None:
        change = 100 * (row["ratio"] - 1)
        note = f"95 %: {100 * (row['ratio_low'] - 1):+.0f} to {100 * (row['ratio_high'] - 1):+.0f} %"
        out.append(Tile(f"{change:+.0f} %", f"KL against {flat}", note))
    if m.get("top1_agreement") is not None:
        out.append(Tile(f"{m['top1_agreement']:.1%}", "same top token"))
    speed, reference = judged.get("tokens_per_second"), _reference_speed(facts)
    if speed and reference:
        out.append(
            Tile(
                f"{speed / reference:.2f} x",
                "prefill speed of all experts",
                f"{speed:,.0f} tok/s here; a busy machine blurs it",
            )
        )
    return out


def _reference_speed(facts: Facts) -> float | None:
    return ((facts.evaluation or {}).get("reference") or {}).get("tokens_per_second")


def policy_rows(facts: Facts) -> list[list[str]]:
    """Every policy that was evaluated, best KL first: the cells of the table in the page and in Markdown."""
    rows = sorted(
        (facts.evaluation or {}).get("policies", []), key=lambda r: r["metrics"]["pooled"]["kl_mean"]
    )
    judged = facts.judged
    out = []
    for row in rows:
        m = row["metrics"]["pooled"]
        name = row.get("label") or row["name"]
        out.append(
            [
                f"{name} (this table)" if judged is not None and row["name"] == judged["name"] else name,
                f"{row['k_mean']:.2f}",
                _interval(m, "kl"),
                _optional(m.get("kl_p99"), "{:.3f}"),
                _optional(m.get("perplexity_ratio"), "{:.4f}"),
                _optional(m.get("top1_agreement"), "{:.2%}"),
                _relative(facts, row["name"]),
                _speeds(row),
            ]
        )
    return out


POLICY_COLUMNS = [
    "policy",
    "mean k",
    "mean KL [95 %]",
    "p99 KL",
    "perplexity x",
    "same top token",
    "KL / flat [95 %]",
    "tok/s: prefill, decode",
]


def _speeds(row: dict[str, Any]) -> str:
    found = [row.get("tokens_per_second"), row.get("decode_tokens_per_second")]
    return ", ".join(f"{value:,.0f}" for value in found if value is not None)


def _relative(facts: Facts, name: str) -> str:
    flat = facts.flat_rival
    row = facts.comparison(flat, policy=name) if flat else None
    if row is None or row.get("ratio") is None:
        return ""
    return f"{row['ratio']:.3f} [{number(row.get('ratio_low')):.3f}, {number(row.get('ratio_high')):.3f}]"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def baseline_note(facts: Facts) -> str:
    """Why two flat baselines stand in the table."""
    names = {family(name) for name in facts.rivals}
    if "flat-alpha" not in names:
        return ""
    return (
        "flat k + alpha keeps as many experts in every layer and only rescales what is kept: its distance "
        "to the table is what the profile adds, its distance to flat k is what the rescaling adds."
    )
