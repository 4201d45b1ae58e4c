"""The same findings as Markdown (for a pull request) and JSON (for a program)."""

from typing import Any

from .facts import Facts
from .verdict import POLICY_COLUMNS, policy_rows, verdict


def summary(facts: Facts) -> dict[str, Any]:
    """summary.json: verdict, policies, and what the profile says about the model."""
    found, judged = verdict(facts), facts.judged
    flat = facts.flat_rival
    mean_divergence = facts.divergence.mean(axis=0)
    return {
        "format": "kttools-expert-summary",
        "version": 1,
        "model": facts.model_name,
        "fingerprint": facts.profile.header["fingerprint"],
        "verdict": found.state,
        "sentences": found.sentences,
        "reasons": found.reasons,
        "policy": None if judged is None else judged["name"],
        "k_mean": None if judged is None else judged["k_mean"],
        "metrics": None if judged is None else judged["metrics"]["pooled"],
        "against_flat": facts.comparison(flat) if flat else None,
        "k_per_layer": {str(layer): k for layer, k in facts.k_per_layer},
        "load_imbalance": _by_layer(facts, facts.imbalance.tolist()),
        "domain_divergence_bits": {
            name: {
                other: round(float(mean_divergence[i, j]), 6)
                for j, other in enumerate(facts.domains)
                if j != i
            }
            for i, name in enumerate(facts.domains)
        },
        "hot_half_coverage": round(float(facts.hot_coverage[:, facts.counts.shape[-1] // 2].mean()), 6),
    }


def _by_layer(facts: Facts, values: list[float]) -> dict[str, float]:
    return {str(layer): round(v, 6) for layer, v in zip(facts.moe_layers, values, strict=True)}


def render_markdown(facts: Facts) -> str:
    found = verdict(facts)
    lines = [f"# Expert profile of {facts.model_name}", "", f"**{found.headline}.**", ""]
    lines += [f"- {sentence}" for sentence in (*found.sentences, *found.reasons)]
    rows = policy_rows(facts)
    if rows:
        lines += ["", "## Every policy", "", *markdown_table(POLICY_COLUMNS, rows)]
    if facts.k_per_layer:
        layers = [[str(layer), f"{k:.2f}", _sensitivity(facts, layer)] for layer, k in facts.k_per_layer]
        columns = ["layer", "k", "sensitivity (nats)"]
        lines += ["", "## Experts per layer", "", *markdown_table(columns, layers)]
    lines += ["", "## Domains", "", *markdown_table(["domain", "documents", "tokens"], _domains(facts))]
    return "\n".join(lines) + "\n"


def _sensitivity(facts: Facts, layer: int) -> str:
    values = facts.sensitivity.get(layer)
    return "" if values is None else f"{values['d']:.4g} +- {values.get('standard_error', 0.0):.2g}"


def _domains(facts: Facts) -> list[list[str]]:
    rows = facts.profile.header["domains"].items()
    return [[name, f"{entry['documents']:,}", f"{entry['tokens']:,}"] for name, entry in rows]


def markdown_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(columns)} |", f"|{'--|' * len(columns)}", *(f"| {' | '.join(r)} |" for r in rows)]
