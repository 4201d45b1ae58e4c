"""The steps of `kttools profile-experts` as functions of a runner and a directory.

A step that was cut off goes on where it stopped: shards, forks and measured policies are kept in the
directory, named by what determines them.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kttools.bundle.atomic import atomic_write_bytes
from kttools_runtime import strict_json
from kttools_runtime.errors import InvalidInputError, UsageError

from .allocate import Allocator
from .candidates import Allocation, Candidate, Say, provenance
from .contest import COMPARED, contest, pareto
from .data import DataSpec
from .data import provenance as data_provenance
from .data_spec import parse_specs
from .evaluate import Evaluation
from .exports import hot_experts, write_exports
from .gather import TextLimits, domain_windows
from .ingredients import make_tables
from .layerwise import LayerRunner, Policies, Window
from .measure import Judge
from .measured_file import MeasuredFiles
from .probes import probe_windows
from .profile_file import Profile, read_profile
from .speed import speeds
from .tables import table_document, write_table

EVALUATION_NAME = "evaluation.json"
MEASURED_DIR = "measured"
TABLES_DIR = "tables"
EXPORTS_DIR = "exports"
KINDS = ("static", "adaptive")


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """What is asked of the table. kind None: the one that measures better on the probe documents."""

    mean: float = 6.0
    kind: str | None = None
    name: str = "experts"
    max_kl: float | None = None

    def kind_of(self, allocation: Allocation) -> str:
        return self.kind or allocation.best_kind


def allocate_step(
    runner: LayerRunner, output: Path, goal: Goal, say: Say = lambda line: None
) -> tuple[Allocator, Allocation, Path]:
    """Tables of both kinds from the profile in `output`; the goal's also under its name."""
    if not 1 <= goal.mean <= runner.config.num_experts_per_tok:
        native = runner.config.num_experts_per_tok
        raise UsageError(f"--mean-experts {goal.mean:g}: expected 1 to {native}, the model's own")
    profile = read_profile(output)
    windows = probe_windows(profile.trace)
    if not windows:
        raise InvalidInputError(f"{output}: the profile has no probe documents; collect again")
    allocator = Allocator(runner, profile, windows, output / MEASURED_DIR, say)
    allocation = make_tables(allocator, goal.mean)
    kind = goal.kind_of(allocation)
    chosen: Candidate = getattr(allocation, kind)
    say(f"chosen: {kind}, KL {chosen.measured.kl_mean:.6f} on the probe documents")
    made = provenance(allocation, profile, windows) | {"k_mean_on": "probe documents of the profile"}
    writer = _Writer(allocator, profile, output, goal, made)
    for own in KINDS:
        candidate: Candidate = getattr(allocation, own)
        expected = {d: candidate.measured.k_mean(d) for d in candidate.measured.kept}
        writer.write(own, own == kind, candidate.policies, expected, None)
    return allocator, allocation, table_path(output, goal)


def table_path(output: Path, goal: Goal) -> Path:
    """The table of the goal."""
    return output / f"{goal.name}.expert-table.json"


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
    """Judges both kinds and the baselines; writes evaluation.json and the tables with their certificates."""
    specs = parse_specs(data)
    chosen = [w for spec in specs for w in domain_windows(runner, spec, limits)]
    judge = Judge(runner, chosen, MeasuredFiles(output / MEASURED_DIR, runner.fingerprint, chosen))
    found = contest(judge, goal.mean, allocator, allocation, say)
    timed = speeds(runner, {"full": {}, **{c.name: c.policies for c in found.contenders}}, chosen)
    evaluation = Evaluation(judge, found.contenders, goal.mean, timed)
    kind = goal.kind_of(allocation)
    profile = read_profile(output)
    facts = {
        "fingerprint": runner.fingerprint,
        "model": profile.header["model"],
        "data": {s.domain: data_facts(s, chosen, set(profile.stats)) for s in specs},
        "ingredients": allocation.chosen,
        "calibration": found.calibration,
    }
    document = evaluation.document(kind, facts, COMPARED, goal.max_kl)
    for mean in pareto_means:
        if mean != goal.mean:
            document["pareto"] += pareto(evaluation, allocator, allocation, mean, say)
    atomic_write_bytes(output / EVALUATION_NAME, strict_json.canonical(document))
    made = provenance(allocation, profile, allocator.windows)
    made |= {"k_mean_on": "evaluation data", "calibration": found.calibration}
    writer = _Writer(allocator, profile, output, goal, made)
    for own in KINDS:
        contender = evaluation.contenders[own]
        expected = {d: contender.measured.k_mean(d) for d in contender.measured.kept}
        certificate = _certificate(document, own, evaluation)
        writer.write(own, own == kind, contender.policies, expected, certificate)
    return document


def export_step(output: Path, folder: Path | None = None) -> list[Path]:
    """What other programs can use, into `folder` (default: output/exports); see kttools.profiling.exports."""
    path = output / EVALUATION_NAME
    evaluation = strict_json.read_object(path) if path.exists() else None
    return write_exports(read_profile(output), evaluation, folder or output / EXPORTS_DIR)


@dataclasses.dataclass(frozen=True, slots=True)
class _Writer:
    """Writes tables/NAME-KIND, and NAME itself for the chosen kind. made: the provenance."""

    allocator: Allocator
    profile: Profile
    output: Path
    goal: Goal
    made: dict[str, Any]

    def write(
        self,
        kind: str,
        is_chosen: bool,
        policies: Policies,
        expected: dict[str, float],
        certificate: dict[str, Any] | None,
    ) -> None:
        name = f"{self.goal.name}-{kind}"
        paths = {name: self.output / TABLES_DIR / f"{name}.expert-table.json"}
        if is_chosen:
            paths[self.goal.name] = table_path(self.output, self.goal)
        runner = self.allocator.runner
        hot = hot_experts(self.profile, self.allocator.kept_shares(policies))
        for own, path in paths.items():
            document = table_document(
                own,
                runner.fingerprint,
                runner.config,
                policies,
                k_mean_target=self.goal.mean,
                k_mean_expected=expected,
                placement={"gpu_hot_experts": hot},
                provenance=self.made,
                certificate=certificate,
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_table(path, document, runner.config)


def _certificate(document: dict[str, Any], kind: str, evaluation: Evaluation) -> dict[str, Any]:
    """What a table was measured to cost, and where that is written down in full."""
    measured = evaluation.contenders[kind].measured
    rows = [r for r in document["comparisons"] if r["policy"] in (kind, "flat-alpha")]
    return document["verdicts"][kind] | {
        "evaluation_sha256": hashlib.sha256(strict_json.canonical(document)).hexdigest(),
        "k_mean": measured.k_mean(),
        "metrics": evaluation.metrics(measured, None),
        "comparisons": [row for row in rows if row["scope"] == "pooled"],
        "domains": {
            row["scope"]: {name: row[name] for name in ("ratio", "ratio_low", "ratio_high", "p_holm")}
            for row in rows
            if row["policy"] == kind and row["against"] == COMPARED[0] and row["scope"] != "pooled"
        },
        "data": document["data"],
    }


def data_facts(spec: DataSpec, chosen: list[Window], profiled: set[str] | None) -> dict[str, Any]:
    """What was judged on. profiled: the domains that the tables were made from; None: not known."""
    own = [w for w in chosen if w.domain == spec.domain]
    origin = data_provenance(spec)
    if not spec.is_hub:
        # Tables travel; the folders of the machine that judged them do not.
        origin["spec"] = origin["spec"].replace(spec.location, Path(spec.location).name)
    return {
        "documents": len({w.document for w in own}),
        "tokens": sum(len(w.token_ids) for w in own),
        "profiled": None if profiled is None else spec.domain in profiled,
        "provenance": origin,
    }
