"""Tables and plain policies against the full model, on any text, without a profile.

Writes evaluation.json and summary.md into a directory. What was measured is kept in its measured/.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kttools.bundle.atomic import atomic_write_bytes
from kttools_runtime import strict_json
from kttools_runtime.errors import UsageError
from kttools_runtime.expert_table import SUFFIX, locate_table, read_table
from kttools_runtime.manifest import read_manifest

from .candidates import Say
from .data_spec import parse_specs
from .evaluate import MEAN_TOLERANCE, Comparison, Contender
from .gather import TextLimits, domain_windows
from .layerwise import LayerRunner, Policies
from .measure import Judge
from .measured_file import MeasuredFiles
from .plain_policies import PlainPolicy
from .profile_file import PROFILE_NAME
from .report.summary import markdown_table
from .run import EVALUATION_NAME, MEASURED_DIR, data_facts
from .speed import speeds

SUMMARY_NAME = "summary.md"
COLUMNS = [
    "policy",
    "mean k",
    "mean KL [95 %]",
    "p99 KL",
    "perplexity x [95 %]",
    "same top token [95 %]",
    "sum min(p, q) [95 %]",
]
AGAINST = ["policy", "against", "text", "KL difference [95 %]", "KL ratio [95 %]", "p (Holm over domains)"]
# A policy that is judged: its name and label, its rules, and whether it is a table.
Entry = tuple[str, str, Policies, bool]


def judge_any(
    runner: LayerRunner,
    bundle: Path,
    data: Sequence[str],
    output: Path,
    limits: TextLimits,
    tables: Sequence[str],
    plain: Sequence[PlainPolicy],
    max_kl: float | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Judges all on the same documents; returns evaluation.json.

    bundle: what the runner runs. tables: files or names. max_kl: the most mean KL a table may have. Raises
    InvalidInputError for a table of another model, UsageError for two policies of one name and for a
    directory that holds a profile.
    """
    entries = [
        *_tables(runner, bundle, tables),
        *((p.text, p.label, p.policies(runner.config), False) for p in plain),
    ]
    _check(entries, output)
    specs = parse_specs(data)
    chosen = [w for spec in specs for w in domain_windows(runner, spec, limits)]
    judge = Judge(runner, chosen, MeasuredFiles(output / MEASURED_DIR, runner.fingerprint, chosen))
    contenders = _measured(judge, entries, say)
    timed = speeds(runner, {"full": {}, **{c.name: c.policies for c in contenders}}, chosen)
    comparison = Comparison(judge, contenders, timed)
    native = runner.config.num_experts_per_tok
    pairs = _pairs(contenders, [p.text for p in plain if p.is_flat], native, say)
    rows = [row for name, flat in pairs for row in comparison.compare(name, flat)]
    document = comparison.facts(rows) | {
        "model": {"name": bundle.name},
        "fingerprint": runner.fingerprint,
        "data": {s.domain: data_facts(s, chosen, None) for s in specs},
        "floor": _floor(contenders, max_kl),
    }
    atomic_write_bytes(output / EVALUATION_NAME, strict_json.canonical(document))
    atomic_write_bytes(output / SUMMARY_NAME, render_summary(document).encode())
    return document


def render_summary(document: dict[str, Any]) -> str:
    """The same findings as Markdown."""
    boot = document["bootstrap"]
    lines = ["# Expert policies against the full model", ""]
    lines += markdown_table(COLUMNS, [_policy_row(policy) for policy in document["policies"]])
    lines += ["", "## Against flat k of the same mean", ""]
    if document["comparisons"]:
        lines += markdown_table(AGAINST, [_pair_row(row) for row in document["comparisons"]])
    else:
        lines += ["No flat k of the same realised mean was given."]
    tested = [[d, f"{f['documents']:,}", f"{f['tokens']:,}"] for d, f in document["data"].items()]
    lines += ["", "## Text", "", *markdown_table(["domain", "documents", "tokens"], tested), ""]
    lines += [
        f"Intervals: {boot['replicates']:,} bootstrap draws of documents, paired, within domains. KL in nats "
        f"a token. Same mean: within {document['k_mean_tolerance']:g}."
    ]
    return "\n".join(lines) + "\n"


def _tables(runner: LayerRunner, bundle: Path, asked: Sequence[str]) -> list[Entry]:
    """Tables as --expert-table finds them.

    Raises InvalidInputError for another model's and what is not there, CorruptFileError for a broken one.
    """
    manifest = read_manifest(bundle)
    found: list[Entry] = []
    for text in asked:
        path = locate_table(text, manifest.path, list(manifest.files))
        if path is None:
            raise UsageError("--table none: the full model is what tables are judged against")
        table = read_table(path, runner.config, runner.fingerprint)
        policies = {i: policy.to(runner.model.device) for i, policy in table.policies.items()}
        name = path.name.removesuffix(SUFFIX)
        found.append((name, f"table {name}", policies, True))
    return found


def _check(entries: Sequence[Entry], output: Path) -> None:
    if (output / PROFILE_NAME).exists():
        raise UsageError(
            f"{output}: holds a profile, whose certificate would be overwritten; give -o another directory"
        )
    names = [name for name, *_ in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two tables or policies are called {twice[0]!r}; rename or remove one")


def _measured(judge: Judge, entries: Sequence[Entry], say: Say) -> list[Contender]:
    contenders = []
    for name, label, policies, is_table in entries:
        measured = judge.measure(policies)
        contenders.append(Contender(name, label, policies, measured, not is_table))
        say(f"{label}: {measured.k_mean():.3f} experts, KL {measured.kl_mean:.5f}")
    return contenders


def _pairs(
    contenders: Sequence[Contender], flats: Sequence[str], native: int, say: Say
) -> list[tuple[str, str]]:
    """Who is compared with which flat k: those whose realised mean is its own.

    The flat k of all native experts is the full model: there is nothing to compare with.
    """
    means = {c.name: c.measured.k_mean() for c in contenders}
    rivals = [flat for flat in flats if means[flat] < native]
    pairs = [
        (name, flat)
        for name in means
        if name not in flats
        for flat in rivals
        if abs(means[name] - means[flat]) <= MEAN_TOLERANCE
    ]
    for contender in contenders:
        if not contender.is_baseline and contender.name not in dict(pairs):
            k_mean = means[contender.name]
            say(f"{contender.label}: compared with no flat k, none given has its mean of {k_mean:.3f}")
    return pairs


def _floor(contenders: Sequence[Contender], max_kl: float | None) -> dict[str, Any] | None:
    if max_kl is None:
        return None
    above = [c for c in contenders if not c.is_baseline and not c.measured.kl_mean <= max_kl]
    reasons = [f"{c.name}: mean KL {c.measured.kl_mean:.5f} is above the floor of {max_kl}" for c in above]
    return {"max_kl": max_kl, "pass": not reasons, "reasons": reasons}


def _policy_row(policy: dict[str, Any]) -> list[str]:
    pooled = policy["metrics"]["pooled"]
    return [
        policy["label"],
        f"{policy['k_mean']:.3f}",
        f"{pooled['kl_mean']:.5f} [{pooled['kl_low']:.5f}, {pooled['kl_high']:.5f}]",
        f"{pooled['kl_p99']:.3f}",
        _with_interval(pooled, "perplexity_ratio"),
        _with_interval(pooled, "top1_agreement"),
        _with_interval(pooled, "overlap"),
    ]


def _pair_row(row: dict[str, Any]) -> list[str]:
    return [
        row["policy"],
        row["against"],
        row["scope"],
        f"{row['kl_difference']:+.5f} [{row['low']:+.5f}, {row['high']:+.5f}]",
        _with_interval(row, "ratio"),
        f"{row['p_holm']:.4f}",
    ]


def _with_interval(values: dict[str, Any], name: str) -> str:
    return f"{values[name]:.4f} [{values[f'{name}_low']:.4f}, {values[f'{name}_high']:.4f}]"
