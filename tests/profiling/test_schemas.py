"""The schemas, what they refuse, and that they and the runtime's own reader name the same keys and words."""

import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from kttools.profiling.data import provenance
from kttools_runtime.expert_policy import KINDS, ORDERS
from kttools_runtime.expert_table import KEYS, LAYER_KEYS, POLICY_KEYS

jsonschema = pytest.importorskip("jsonschema")
REPO = Path(__file__).resolve().parents[2]


def schema(name: str) -> dict[str, Any]:
    path = files("kttools.profiling").joinpath("schemas", f"{name}.schema.json")
    return json.loads(path.read_text(encoding="utf-8"))


def check(name: str, document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema(name)).validate(document)


def make_table() -> dict[str, Any]:
    layer = {"k": 6, "sigma": None, "alpha": [1.0] * 8, "ratios": None, "protect": [3]}
    return {
        "format": "kttools-expert-table",
        "version": 1,
        "tool": {"name": "kttools", "version": "0"},
        "name": "static-6",
        "fingerprint": "0" * 64,
        "policy": {
            "kind": "static",
            "k_native": 8,
            "k_min": 1,
            "k_max": 8,
            "k_mean_target": 6.0,
            "k_mean_expected": {"python": 6.0},
            "order": "weight",
            "renormalize": False,
            "protect_prefix_tokens": 0,
            "threshold": 0.0,
            "layers": [{"layer": n, **layer} for n in (1, 2, 3)],
        },
        "expert_norm": None,
        "placement": {"gpu_hot_experts": {"1": [2, 0]}},
        "provenance": {},
        "certificate": {"pass": True, "reasons": []},
    }


def make_profile(origin: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": "kttools-expert-profile",
        "version": 1,
        "tool": {"name": "kttools", "version": "0"},
        "fingerprint": "0" * 64,
        "model": {"name": "ds3-nano"},
        "router": {"moe_layers": [1, 2, 3], "n_routed_experts": 32, "num_experts_per_tok": 8},
        "domains": {"c": {"documents": 13, "tokens": 9000, "provenance": origin}},
        "shards": [{"id": "c-00000", "domain": "c", "documents": 13, "tokens": 9000, "sha256": "1" * 64}],
        "sidecar": {"file": "profile.safetensors", "sha256": "2" * 64, "bytes": 10},
        "statistics": {"count": {"shape": [3, 32], "dtype": "F64"}},
    }


@pytest.mark.parametrize("name", ["expert-table", "expert-profile", "expert-evaluation"])
def test_schemas_are_schemas(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema(name))


def test_a_profile_with_the_provenance_that_the_reader_of_data_gives(samples_dir: Path) -> None:
    check("expert-profile", make_profile(provenance(f"c=jsonl:{samples_dir}/text/c.jsonl")))


def test_a_table() -> None:
    check("expert-table", make_table())


TABLE_FAULTS = {
    "unknown key": lambda t: t.update(extra=1),
    "missing key": lambda t: t.pop("expert_norm"),
    "fingerprint": lambda t: t.update(fingerprint="abc"),
    "kind": lambda t: t["policy"].update(kind="magic"),
    "k": lambda t: t["policy"]["layers"][0].update(k=0),
    "negative alpha": lambda t: t["policy"]["layers"][0].update(alpha=[-1.0]),
    "protected twice": lambda t: t["policy"]["layers"][0].update(protect=[1, 1]),
    "certificate": lambda t: t.update(certificate={"pass": "yes", "reasons": []}),
}


@pytest.mark.parametrize("fault", TABLE_FAULTS.values(), ids=TABLE_FAULTS.keys())
def test_faulty_tables_are_refused(fault: Any) -> None:
    table = copy.deepcopy(make_table())
    fault(table)
    with pytest.raises(jsonschema.ValidationError):
        check("expert-table", table)


def test_a_sidecar_is_a_bare_name() -> None:
    profile = make_profile({"spec": "c=text:x", "kind": "text"})
    check("expert-profile", profile)
    profile["sidecar"]["file"] = "../profile.safetensors"
    with pytest.raises(jsonschema.ValidationError):
        check("expert-profile", profile)


def test_the_schema_and_the_runtime_know_the_same_keys_and_words() -> None:
    table = schema("expert-table")
    policy, layer = table["$defs"]["policy"], table["$defs"]["layer"]
    assert set(table["properties"]) == set(table["required"]) == KEYS
    assert set(policy["properties"]) == set(policy["required"]) == POLICY_KEYS
    assert set(layer["properties"]) == set(layer["required"]) == LAYER_KEYS
    assert set(policy["properties"]["kind"]["enum"]) == set(KINDS)
    assert set(policy["properties"]["order"]["enum"]) == set(ORDERS)


@pytest.mark.parametrize("path", sorted((REPO / "profiles").glob("*.json")), ids=lambda path: path.name)
def test_shipped_files_follow_the_schema(path: Path) -> None:
    check(path.name.split(".")[-2], json.loads(path.read_text(encoding="utf-8")))
