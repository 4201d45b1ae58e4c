"""The steps of `kttools profile-experts` as functions of a runner and a directory."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kttools.bundle.atomic import atomic_write_bytes
from kttools_runtime import strict_json
from kttools_runtime.errors import InvalidInputError, UsageError

from .allocate import Allocation, Allocator, provenance
from .collect import Collected, Part, Progress, collect, limited
from .data import DataSpec, documents
from .data import provenance as data_provenance
from .data_spec import parse_specs
from .evaluate import Contender, Evaluation, pareto_point
from .layerwise import LayerRunner, Policies, Window
from .measure import Judge, Measured
from .policies import Baselines
from .profile_file import Profile, merge, read_profile
from .tables import table_document, write_table

EVALUATION_NAME = "evaluation.json"
WHOLE = Part()
Say = Callable[[str], object]


@dataclasses.dataclass(frozen=True, slots=True)
class TextLimits:
    """Tokens per window and document, and per domain (None: all)."""

    window_tokens: int = 1024
    domain_tokens: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """What is asked of the table. kind None: the one that measures better on the probe documents."""

    mean: float = 6.0
    kind: str | None = None
    name: str = "experts"
    max_kl: float | None = None


def collect_step(
    runner: LayerRunner,
    data: Sequence[str],
    output: Path,
    limits: TextLimits,
    model_name: str,
    part: Part = WHOLE,
    on_tokens: Progress = lambda count: None,
) -> list[Collected]:
    """Records every domain; see kttools.profiling.collect."""
    return [
        collect(
            runner,
            spec.domain,
            _windows(runner, spec, limits),
            data_provenance(spec),
            output,
            window_tokens=limits.window_tokens,
            model_name=model_name,
            part=part,
            on_tokens=on_tokens,
        )
        for spec in _specs(data)
    ]


def merge_step(inputs: Sequence[Path], output: Path) -> Profile:
    """All shards of the directories into one profile in `output`."""
    paths = [path for folder in inputs for path in sorted((folder / "shards").glob("*.safetensors"))]
    return merge(paths, output)


def allocate_step(
    runner: LayerRunner, output: Path, goal: Goal, say: Say = lambda line: None
) -> tuple[Allocator, Allocation, Path]:
    """The table of the goal, from the profile in `output`."""
    profile = read_profile(output)
    allocator = Allocator(runner, profile, say)
    allocation = allocator.run(goal.mean)
    chosen = allocation.best if goal.kind is None else getattr(allocation, goal.kind)
    say(f"chosen: {chosen.name}, KL {chosen.measured.kl_mean:.6f} on the probe documents")
    path = output / f"{goal.name}.expert-table.json"
    document = table_document(
        goal.name,
        runner.fingerprint,
        runner.config,
        chosen.policies,
        k_mean_target=goal.mean,
        k_mean_expected={d: chosen.measured.k_mean(d) for d in chosen.measured.kept},
        placement={"gpu_hot_experts": hot_experts(profile)},
        provenance=provenance(allocation, profile, allocator.windows),
    )
    write_table(path, document, runner.config)
    return allocator, allocation, path


def evaluate_step(
    runner: LayerRunner,
    data: Sequence[str],
    output: Path,
    limits: TextLimits,
    goal: Goal,
    allocator: Allocator,
    allocation: Allocation,
    pareto_means: Sequence[float] = (),
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Judges both kinds and the baselines; writes evaluation.json and the certificate into the table."""
    specs = _specs(data)
    chosen = [w for spec in specs for w in _windows(runner, spec, limits)]
    judge = Judge(runner, chosen)
    contenders = _contenders(judge, goal, allocator, allocation, say)
    evaluation = Evaluation(judge, contenders)
    kind = goal.kind or allocation.best.name
    profiled = set(read_profile(output).stats)
    facts = {
        "fingerprint": runner.fingerprint,
        "model": read_profile(output).header["model"],
        "data": {s.domain: _data_facts(s, chosen, profiled) for s in specs},
    }
    document = evaluation.document(kind, facts, ["flat", "flat-alpha", "ser"], goal.max_kl)
    for mean in pareto_means:
        document["pareto"] += _pareto(evaluation, judge, allocator, mean, say)
    data_bytes = strict_json.canonical(document)
    atomic_write_bytes(output / EVALUATION_NAME, data_bytes)
    _certify(output / f"{goal.name}.expert-table.json", runner, document, kind, evaluation)
    return document


def hot_experts(profile: Profile) -> dict[str, list[int]]:
    """Experts by how often they are chosen, the hottest first: what a GPU should hold."""
    shares = [stats["count"] / stats["tokens"][:, None] for _, stats in sorted(profile.stats.items())]
    count = np.sum(shares, axis=0)
    layers = profile.header["router"]["moe_layers"]
    return {str(layer): (-count[row]).argsort(kind="stable").tolist() for row, layer in enumerate(layers)}


def _contenders(
    judge: Judge, goal: Goal, allocator: Allocator, allocation: Allocation, say: Say
) -> list[Contender]:
    found: list[Contender] = []

    def add(name: str, label: str, policies: Policies, measured: Measured, is_baseline: bool) -> None:
        found.append(Contender(name, label, policies, measured, is_baseline))
        say(f"{label}: {measured.k_mean():.3f} experts, KL {measured.kl_mean:.5f}")

    baselines, mean, k = Baselines(judge), goal.mean, round(goal.mean)
    flat = baselines.flat(k)
    add("flat", f"flat top-{k}, renormalised", flat, judge.measure(flat), True)
    alpha = allocator.uniform(k, "choice", scaled=True)
    add("flat-alpha", f"flat top-{k} + alpha", alpha, judge.measure(alpha), True)
    static = allocation.static.policies
    add("static", "static table", static, judge.measure(static), False)
    adaptive = allocation.adaptive.policies
    written = judge.measure(adaptive)
    add("adaptive", "adaptive table", adaptive, written, False)
    sigma = {i: p.sigma for i, p in adaptive.items()}
    matched, measured = allocator.calibrated(mean, judge, sigma)
    add("adaptive-matched", f"adaptive, lambda set for mean {mean:g} here", matched, measured, False)
    label, policies, measured = baselines.ser(mean)
    add("ser", label, policies, measured, True)
    add("top-p", "top-p, renormalised", *baselines.top_p(mean), True)
    add("naee", "NAEE at every rank", *baselines.naee(mean), True)
    return found


def _pareto(
    evaluation: Evaluation, judge: Judge, allocator: Allocator, mean: float, say: Say
) -> list[dict[str, Any]]:
    sigma = allocator.sigma()
    rows = {
        "flat": allocator.uniform(round(mean), "choice", scaled=False),
        "flat-alpha": allocator.uniform(round(mean), "choice", scaled=True),
        "static": allocator.static(mean),
        "adaptive": allocator.adaptive(mean, sigma),
    }
    points = []
    for name, policies in rows.items():
        contender = Contender(name, name, policies, judge.measure(policies), name.startswith("flat"))
        points.append(pareto_point(evaluation.policy_document(contender)))
        say(f"pareto {name}: {points[-1]['k_mean']:.3f} experts, KL {points[-1]['kl_mean']:.5f}")
    return points


def _certify(
    path: Path, runner: LayerRunner, document: dict[str, Any], kind: str, evaluation: Evaluation
) -> None:
    """Puts the verdict into the table it judged."""
    import hashlib

    table = strict_json.read_object(path)
    measured = evaluation.contenders[kind].measured
    table["certificate"] = document["verdict"] | {
        "evaluation_sha256": hashlib.sha256(strict_json.canonical(document)).hexdigest(),
        "k_mean": measured.k_mean(),
        "kl_mean": measured.kl_mean,
        "comparisons": [
            row for row in document["comparisons"] if row["policy"] == kind and row["scope"] == "pooled"
        ],
    }
    write_table(path, table, runner.config)


def _specs(data: Sequence[str]) -> list[DataSpec]:
    specs = list(parse_specs(data))
    names = [spec.domain for spec in specs]
    if len(set(names)) != len(names):
        raise UsageError(f"two data sets of one domain: {', '.join(names)}; name them NAME=KIND:FILE#FIELD")
    return specs


def _windows(runner: LayerRunner, spec: DataSpec, limits: TextLimits) -> list[Window]:
    found = list(limited(documents(spec, runner.model.tokenizer), limits.window_tokens, limits.domain_tokens))
    if not found:
        raise InvalidInputError(f"{spec.text}: no document has two tokens or more")
    return found


def _data_facts(spec: DataSpec, chosen: list[Window], profiled: set[str]) -> dict[str, Any]:
    own = [w for w in chosen if w.domain == spec.domain]
    return {
        "documents": len({w.document for w in own}),
        "tokens": sum(len(w.token_ids) for w in own),
        "profiled": spec.domain in profiled,
        "provenance": data_provenance(spec),
    }
