"""The tables in profiles/: found by name, made for the sample model, with a certificate that was measured."""

import json
from pathlib import Path

import pytest
import torch

import kttools_runtime as kt

REPO = Path(__file__).resolve().parents[2]
TABLES = sorted((REPO / "profiles").glob("*.expert-table.json"))


def test_both_kinds_are_there() -> None:
    kinds = {json.loads(path.read_text(encoding="utf-8"))["policy"]["kind"] for path in TABLES}
    assert kinds == {"static", "adaptive"}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_a_shipped_table_is_found_by_name_and_changes_the_model(nano_bundle: Path, path: Path) -> None:
    name = path.name.removesuffix(".expert-table.json")
    table = json.loads(path.read_text(encoding="utf-8"))
    assert table["name"] == name
    ids = torch.arange(100, 164)
    with_table = kt.load(nano_bundle, threads=1, expert_table=name).logits(ids)
    without = kt.load(nano_bundle, threads=1, expert_table="none").logits(ids)
    assert not torch.equal(with_table, without)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_a_shipped_table_says_what_it_costs(path: Path) -> None:
    certificate = json.loads(path.read_text(encoding="utf-8"))["certificate"]
    assert certificate["pass"] == (not certificate["reasons"])
    metrics = certificate["metrics"]
    assert metrics["kl_low"] < metrics["kl_mean"] < metrics["kl_high"]
    assert {row["against"] for row in certificate["comparisons"]} == {"flat", "flat-alpha", "ser"}
    assert sum(not entry["profiled"] for entry in certificate["data"].values()) >= 2
    assert abs(certificate["k_mean"] - 6) <= 0.02
