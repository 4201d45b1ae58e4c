"""Allocation and evaluation of the sample model through the steps: files, certificate, resuming, exports."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kttools_runtime as kt
from kttools.profiling import run
from kttools.profiling.candidates import Allocation
from kttools.profiling.exports import LLAMA_ARCHITECTURE, kept_counts
from kttools.profiling.gather import Job, TextLimits, collect_part, merge_directories
from kttools.profiling.layerwise import LayerRunner
from kttools.profiling.measure import Judge
from kttools.profiling.profile_file import read_profile
from kttools_runtime.errors import CorruptFileError, InvalidInputError, UsageError

from .test_schemas import check

GOAL = run.Goal(mean=6.0, name="t")
JUDGED = TextLimits(64, 300)
Judged = tuple[Allocation, dict[str, Any]]


def specs(samples_dir: Path, *domains: str) -> list[str]:
    return [f"{d}=jsonl:{samples_dir / 'text' / d}.jsonl#text" for d in domains]


@pytest.fixture(scope="module")
def directory(
    nano_bundle: Path, samples_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A profile of two domains."""
    output = tmp_path_factory.mktemp("profile")
    before = torch.get_num_threads()
    data = tuple(specs(samples_dir, "python", "prose"))
    collect_part(Job(nano_bundle, data, output, TextLimits(64, 400), gram_every=2, threads=1))
    merge_directories([output], output)
    yield output
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def judged(runner: LayerRunner, directory: Path, samples_dir: Path) -> Judged:
    allocator, allocation, _ = run.allocate_step(runner, directory, GOAL)
    data = specs(samples_dir, "prose", "c")
    document = run.evaluate_step(runner, data, directory, JUDGED, GOAL, allocator, allocation, [4.0])
    return allocation, document


def test_everyone_is_measured_at_the_mean(judged: Judged) -> None:
    _, document = judged
    means = {p["name"]: p["k_mean"] for p in document["policies"]}
    assert set(means) == {"flat", "flat-alpha", "static", "adaptive", "ser", "top-p", "naee"}
    assert all(abs(mean - 6) <= 0.05 for mean in means.values())
    assert abs(means["adaptive"] - 6) <= 0.02
    assert means["static"] == 6
    assert all(p["tokens_per_second"] > 0 for p in document["policies"])
    assert {p["policy"] for p in document["pareto"] if p["k_mean"] < 5} == {
        "flat",
        "flat-alpha",
        "static",
        "adaptive",
    }
    assert document["data"]["prose"]["profiled"] is True
    assert document["data"]["c"]["profiled"] is False
    assert document["data"]["c"]["provenance"]["spec"] == "c=jsonl:c.jsonl#text"


def test_the_evaluation_follows_the_schema(judged: Judged, directory: Path) -> None:
    check("expert-evaluation", json.loads((directory / "evaluation.json").read_text()))


def test_tables_carry_their_certificates(
    judged: Judged, directory: Path, runner: LayerRunner, nano_bundle: Path
) -> None:
    allocation, document = judged
    chosen = json.loads((directory / "t.expert-table.json").read_text())
    assert chosen["policy"]["kind"] == allocation.best_kind == document["table"]
    for kind in ("static", "adaptive"):
        path = directory / "tables" / f"t-{kind}.expert-table.json"
        table = json.loads(path.read_text())
        assert table["certificate"]["pass"] == document["verdicts"][kind]["pass"]
        assert table["certificate"]["k_mean"] == pytest.approx(6, abs=0.02)
        assert {row["against"] for row in table["certificate"]["comparisons"]} == {
            "flat",
            "flat-alpha",
            "ser",
        }
        assert table["provenance"]["steps"]
        assert set(table["provenance"]["ingredients"]) >= {"scaling", "static order", "adaptive order"}
        kt.load(nano_bundle, threads=1, expert_table=path)


def test_the_adaptive_table_is_the_calibrated_one(judged: Judged, directory: Path) -> None:
    _, document = judged
    table = json.loads((directory / "tables/t-adaptive.expert-table.json").read_text())
    found = document["calibration"]["adaptive"]
    assert table["policy"]["threshold"] == found["threshold"]
    assert table["provenance"]["calibration"]["adaptive"] == found
    assert abs(found["k_mean"] - 6) <= abs(found["k_mean_from_probes"] - 6) + 0.004


def test_a_second_run_measures_nothing_again(
    judged: Judged,
    directory: Path,
    runner: LayerRunner,
    samples_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocation, document = judged

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Judge, "_measure", refuse)
    monkeypatch.setattr("kttools.profiling.allocate.sensitivities", refuse)
    allocator, again, _ = run.allocate_step(runner, directory, GOAL)
    assert again.trials.steps == allocation.trials.steps
    data = specs(samples_dir, "prose", "c")
    repeated = run.evaluate_step(runner, data, directory, JUDGED, GOAL, allocator, again, [4.0])
    assert repeated["comparisons"] == document["comparisons"]


def test_exports(judged: Judged, directory: Path, tmp_path: Path) -> None:
    _, document = judged
    written = {path.name: json.loads(path.read_text()) for path in run.export_step(directory, tmp_path)}
    profile = read_profile(directory)
    (rows,) = written["logical_count.json"]["logical_count"]
    layers = profile.header["router"]["moe_layers"]
    assert (len(rows), len(rows[0])) == (max(layers) + 1, 32)
    assert not any(rows[0])  # the dense layer
    assert sum(map(sum, rows)) == profile.pooled()["count"].sum()
    placement = written["gpu-placement.json"]
    assert placement["fingerprint"] == document["fingerprint"]
    assert all(sorted(ids) == list(range(32)) for ids in placement["gpu_hot_experts"].values())
    assert all(row[-1] == 1.0 and sorted(row) == row for row in placement["covered"].values())
    hint = written["llama-cpp.json"]
    assert hint["arguments"] == ["--override-kv", f"{LLAMA_ARCHITECTURE}.expert_used_count=int:6"]
    flat = next(p for p in document["policies"] if p["name"] == "flat")
    assert hint["measured"]["kl_mean"] == flat["metrics"]["pooled"]["kl_mean"]


def test_computed_experts_follow_the_table(directory: Path) -> None:
    profile = read_profile(directory)
    layers = len(profile.header["router"]["moe_layers"])
    shares = np.zeros((layers, 8))
    shares[:, :3] = 1.0
    assert kept_counts(profile).sum(axis=1) == pytest.approx(8.0)
    assert kept_counts(profile, shares).sum(axis=1) == pytest.approx(3.0)


@pytest.mark.parametrize("mean", [0.5, 8.5])
def test_a_mean_the_model_cannot_have(runner: LayerRunner, directory: Path, mean: float) -> None:
    with pytest.raises(UsageError, match="expected 1 to 8"):
        run.allocate_step(runner, directory, run.Goal(mean=mean))


def test_another_models_profile_is_refused(runner: LayerRunner, directory: Path, tmp_path: Path) -> None:
    for path in directory.glob("profile.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    header = tmp_path / "profile.expert-profile.json"
    header.write_text(header.read_text().replace(runner.fingerprint, "0" * 64))
    with pytest.raises(InvalidInputError, match="made of another model"):
        run.allocate_step(runner, tmp_path, GOAL)


def test_a_profile_with_nan_is_refused(runner: LayerRunner, directory: Path, tmp_path: Path) -> None:
    from kttools.profiling.profile_file import write_profile

    profile = read_profile(directory)
    profile.stats["prose"]["gram_weight"][0, 0, 0] = np.nan
    write_profile(tmp_path, profile)
    with pytest.raises(CorruptFileError, match="gram_weight holds values that are not finite"):
        run.allocate_step(runner, tmp_path, GOAL)
