"""Tables as hostile input: every fault is refused, and the message says where it is."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kttools_runtime as kt
from kttools.cli import main
from kttools.profiling.tables import table_document
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.expert_policy import LayerPolicy
from kttools_runtime.expert_table import MAX_TABLE_BYTES, locate_table, parse_table
from kttools_runtime.manifest import load_manifest

Table = dict[str, Any]


@pytest.fixture(scope="module")
def config(nano_bundle: Path) -> ModelConfig:
    return load_manifest(nano_bundle).model


@pytest.fixture(scope="module")
def table(config: ModelConfig) -> Table:
    policies = {
        i: LayerPolicy(kind="adaptive", sigma=2.0, threshold=0.1, k_max=8, alpha=torch.ones(8))
        for i in config.moe_layers
    }
    return table_document(
        "t",
        "0" * 64,
        config,
        policies,
        k_mean_target=6.0,
        k_mean_expected={},
        placement={},
        provenance={},
    )


def layer(change: dict[str, Any]) -> Callable[[Table], None]:
    return lambda t: t["policy"]["layers"][0].update(change)


FAULTS: dict[str, tuple[Callable[[Table], Any], str]] = {
    "format": (lambda t: t.update(format="x"), "not an expert table"),
    "version": (lambda t: t.update(version=2), "table version 2"),
    "version as text": (lambda t: t.update(version="1"), "table version '1'"),
    "unknown key": (lambda t: t.update(extra=1), "unknown or missing keys: extra"),
    "missing key": (lambda t: t.pop("policy"), "unknown or missing keys: policy"),
    "name": (lambda t: t.update(name=7), "name and fingerprint must be strings"),
    "policy is a list": (lambda t: t.update(policy=[]), "policy must be an object"),
    "kind": (lambda t: t["policy"].update(kind="magic"), "policy.kind: expected one of"),
    "order": (lambda t: t["policy"].update(order="random"), "policy.order: expected one of"),
    "order without norms": (lambda t: t["policy"].update(order="contribution"), "needs expert_norm"),
    "k_native": (lambda t: t["policy"].update(k_native=9), "policy.k_native: expected 8, got 9"),
    "k_min": (lambda t: t["policy"].update(k_min=0), "policy.k_min: expected an integer from 1 to 8"),
    "k_max below k_min": (lambda t: t["policy"].update(k_min=5, k_max=4), "policy.k_max"),
    "k_max as true": (lambda t: t["policy"].update(k_max=True), "policy.k_max: expected an integer"),
    "threshold": (lambda t: t["policy"].update(threshold=-1.0), "policy.threshold: expected a number"),
    "renormalize": (lambda t: t["policy"].update(renormalize=1), "renormalize must be true or false"),
    "prefix": (lambda t: t["policy"].update(protect_prefix_tokens=4), "supports only 0"),
    "layers": (lambda t: t["policy"].update(layers={}), "policy.layers must be a list"),
    "a layer missing": (lambda t: t["policy"]["layers"].pop(), "must list the MoE layers"),
    "a layer twice": (lambda t: t["policy"]["layers"].append(t["policy"]["layers"][0]), "must list the MoE"),
    "order of layers": (lambda t: t["policy"]["layers"].reverse(), "must list the MoE layers"),
    "sigma": (layer({"sigma": 1e31}), r"layers\[1\].sigma: expected a number"),
    "alpha": (layer({"alpha": [1.0] * 7}), r"layers\[1\].alpha: expected 8 numbers"),
    "negative alpha": (layer({"alpha": [-1.0] * 8}), r"layers\[1\].alpha: expected a number from 0"),
    "alpha as text": (layer({"alpha": ["1"] * 8}), r"layers\[1\].alpha: expected a number"),
    "ratios": (layer({"ratios": [0.5] * 8}), "ratios: given for kind naee"),
    "protect": (layer({"protect": [32]}), r"protect: expected an integer from 0 to 31, got 32"),
    "protect negative": (layer({"protect": [-1]}), "protect: expected an integer from 0 to 31"),
    "unknown key in a layer": (layer({"x": 1}), "policy.layers: unknown or missing keys: x"),
    "norms": (lambda t: t.update(expert_norm={"1": [1.0] * 32}), "expert_norm must give every MoE layer"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_refused(
    table: Table, config: ModelConfig, fault: Callable[[Table], Any], message: str
) -> None:
    broken = copy.deepcopy(table)
    fault(broken)
    with pytest.raises(InvalidInputError, match=message):
        parse_table(json.dumps(broken).encode(), "t.json", config, None)


def test_the_table_without_a_fault_is_read(table: Table, config: ModelConfig) -> None:
    assert parse_table(json.dumps(table).encode(), "t.json", config, "0" * 64).name == "t"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(table: Table, config: ModelConfig, number: str) -> None:
    text = json.dumps(table).replace('"threshold": 0.1', f'"threshold": {number}')
    assert number in text
    with pytest.raises(CorruptFileError):
        parse_table(text.encode(), "t.json", config, None)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_no_table_at_all(data: bytes, config: ModelConfig) -> None:
    with pytest.raises(CorruptFileError):
        parse_table(data, "t.json", config, None)


def test_a_key_given_twice_is_refused(table: Table, config: ModelConfig) -> None:
    text = json.dumps(table).replace('"name": "t"', '"name": "t", "name": "u"')
    with pytest.raises(CorruptFileError, match="name"):
        parse_table(text.encode(), "t.json", config, None)


def test_a_file_too_large_is_not_read(nano_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with path.open("wb") as file:
        file.truncate(MAX_TABLE_BYTES + 1)
    with pytest.raises(CorruptFileError, match=r"larger|bytes"):
        kt.load(nano_bundle, threads=1, expert_table=path)


def test_another_models_table_ends_the_command_with_3(
    nano_bundle: Path, table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(table))
    options = ["-p", "x", "-n", "1", "-t", "1", "--quiet"]
    assert main(["chat", str(nano_bundle), *options, "--expert-table", str(path)]) == 3
    message = capsys.readouterr().err
    assert "made for another model" in message
    assert "--expert-table none" in message


def test_names_are_looked_up_in_the_bundle_then_in_the_folders(tmp_path: Path) -> None:
    (tmp_path / "mine.expert-table.json").write_text("{}")

    def find(asked: str) -> Path | None:
        return locate_table(asked, tmp_path.joinpath, ["expert-tables/own.expert-table.json"], [tmp_path])

    assert find("own") == tmp_path / "expert-tables/own.expert-table.json"
    assert find("mine") == tmp_path / "mine.expert-table.json"
    assert find("none") is None
    with pytest.raises(InvalidInputError, match="in this bundle: own; tables of the project: mine"):
        find("other")
