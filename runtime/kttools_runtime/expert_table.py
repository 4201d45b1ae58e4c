"""Expert tables: `*.expert-table.json`, read as hostile input and bound to the model they were made for.

A table says, per MoE layer, which of the router's choices are computed (kttools_runtime.expert_policy). It
carries the fingerprint of its model; another model's table is refused, never ignored.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import strict_json
from .config import ModelConfig
from .errors import CorruptFileError, InvalidInputError
from .expert_policy import FIXED_KINDS, KINDS, ORDERS, LayerPolicy

FORMAT = "kttools-expert-table"
VERSION = 1
SUFFIX = ".expert-table.json"
# The default table of a bundle, when its manifest lists it.
BUNDLE_TABLE = "expert-table.json"
# Folder of its named tables.
BUNDLE_TABLES = "expert-tables/"
MAX_TABLE_BYTES = 64_000_000
KEYS = {
    "format",
    "version",
    "tool",
    "name",
    "fingerprint",
    "policy",
    "expert_norm",
    "placement",
    "provenance",
    "certificate",
}
POLICY_KEYS = {
    "kind",
    "k_native",
    "k_min",
    "k_max",
    "k_mean_target",
    "k_mean_expected",
    "order",
    "renormalize",
    "protect_prefix_tokens",
    "threshold",
    "layers",
}
LAYER_KEYS = {"layer", "k", "sigma", "alpha", "ratios", "protect"}


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """A checked table. policies: one per MoE layer, by model layer index; document: the JSON it came from."""

    name: str
    fingerprint: str
    policies: dict[int, LayerPolicy]
    document: dict[str, Any]


def model_fingerprint(config: ModelConfig, routers: Mapping[int, tuple[Tensor, ...]]) -> str:
    """SHA-256 (hex) of a model as far as a table depends on it: its config and its routers.

    routers: (weight [n_routed_experts, hidden_size], e_score_correction_bias if there is one) by MoE layer,
    hashed as float32. Two bundles of one checkpoint in different formats have the same fingerprint.
    """
    digest = hashlib.sha256(strict_json.canonical(config.to_dict()))
    for layer in sorted(routers):
        digest.update(f"layer {layer}\n".encode())
        for tensor in routers[layer]:
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_table(path: str | Path, config: ModelConfig, fingerprint: str | None) -> ExpertTable:
    """Reads a table for a model. fingerprint None: which model it is for is not checked.

    Raises InvalidInputError (no such file, another model's table), CorruptFileError naming the key.
    """
    return parse_table(strict_json.read_bounded(Path(path), MAX_TABLE_BYTES), str(path), config, fingerprint)


def parse_table(data: bytes, where: str, config: ModelConfig, fingerprint: str | None) -> ExpertTable:
    """Checks the bytes of a table; see read_table."""
    document = strict_json.parse(data, where)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CorruptFileError(f"{where}: not an expert table (format is not {FORMAT})")
    if document.get("version") != VERSION or type(document["version"]) is not int:
        found = document.get("version")
        raise InvalidInputError(f"{where}: table version {found!r:.40}, this program reads version {VERSION}")
    reader = _Reader(where, config)
    reader.keys(document, KEYS, "table")
    name, own = document["name"], document["fingerprint"]
    if not isinstance(name, str) or not isinstance(own, str):
        reader.fail("name and fingerprint must be strings")
    if fingerprint is not None and own != fingerprint:
        raise InvalidInputError(
            f"{where}: made for another model: expected fingerprint {fingerprint[:16]}..., got {own[:16]!r}; "
            "make one with kttools profile-experts, or use --expert-table none"
        )
    norms = reader.norms(document["expert_norm"])
    return ExpertTable(name, own, reader.policies(document["policy"], norms), document)


class _Reader:
    """The parts of a table, each checked against the model before it is used."""

    def __init__(self, where: str, config: ModelConfig) -> None:
        self.where = where
        self.config = config

    def fail(self, problem: str) -> NoReturn:
        raise CorruptFileError(f"{self.where}: {problem}")

    def keys(self, value: Any, expected: set[str], what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(f"{what} must be an object")
        if set(value) != expected:
            self.fail(f"{what}: unknown or missing keys: {', '.join(sorted(set(value) ^ expected)):.200}")
        return value

    def norms(self, value: Any) -> dict[int, Tensor]:
        """Typical output norms by MoE layer; empty when the table has none."""
        if value is None:
            return {}
        if not isinstance(value, dict) or sorted(value) != sorted(map(str, self.config.moe_layers)):
            self.fail("expert_norm must give every MoE layer once")
        count = self.config.n_routed_experts
        return {int(layer): self._numbers(row, count, f"expert_norm.{layer}") for layer, row in value.items()}

    def policies(self, value: Any, norms: dict[int, Tensor]) -> dict[int, LayerPolicy]:
        policy = self.keys(value, POLICY_KEYS, "policy")
        self._check_policy(policy, norms)
        layers = policy["layers"]
        if not isinstance(layers, list):
            self.fail("policy.layers must be a list")
        entries = [self.keys(layer, LAYER_KEYS, "policy.layers") for layer in layers]
        if [entry["layer"] for entry in entries] != list(self.config.moe_layers):
            self.fail(
                f"policy.layers must list the MoE layers {list(self.config.moe_layers)!s:.120} in order"
            )
        return {entry["layer"]: self._layer(policy, entry, norms) for entry in entries}

    def _check_policy(self, policy: dict[str, Any], norms: dict[int, Tensor]) -> None:
        native = self.config.num_experts_per_tok
        self._choice(policy["kind"], KINDS, "kind")
        self._choice(policy["order"], ORDERS, "order")
        if policy["order"] == "contribution" and not norms:
            self.fail("policy.order contribution needs expert_norm")
        if policy["k_native"] != native:
            self.fail(f"policy.k_native: expected {native}, got {policy['k_native']!r:.40}")
        self._integer(policy["k_min"], 1, native, "policy.k_min")
        self._integer(policy["k_max"], policy["k_min"], native, "policy.k_max")
        self._number(policy["threshold"], "policy.threshold")
        if type(policy["renormalize"]) is not bool:
            self.fail("policy.renormalize must be true or false")
        if policy["protect_prefix_tokens"] != 0:
            self.fail("policy.protect_prefix_tokens: this version supports only 0")

    def _layer(self, policy: dict[str, Any], entry: dict[str, Any], norms: dict[int, Tensor]) -> LayerPolicy:
        native, what = self.config.num_experts_per_tok, f"policy.layers[{entry['layer']}]"
        is_fixed = policy["kind"] in FIXED_KINDS
        if is_fixed:
            self._integer(entry["k"], 1, native, f"{what}.k")
        if (policy["kind"] == "naee") != (entry["ratios"] is not None):
            self.fail(f"{what}.ratios: given for kind naee, and only for it")
        sigma = 1.0 if entry["sigma"] is None else self._number(entry["sigma"], f"{what}.sigma")
        return LayerPolicy(
            kind=policy["kind"],
            order=policy["order"],
            k=entry["k"] if is_fixed else 0,
            k_min=policy["k_min"],
            k_max=policy["k_max"],
            threshold=float(policy["threshold"]),
            sigma=sigma,
            alpha=self._optional(entry["alpha"], f"{what}.alpha"),
            ratios=self._optional(entry["ratios"], f"{what}.ratios"),
            norms=norms.get(entry["layer"]) if policy["order"] == "contribution" else None,
            protect=self._protected(entry["protect"], f"{what}.protect"),
            renormalize=policy["renormalize"],
        )

    def _optional(self, value: Any, what: str) -> Tensor | None:
        return None if value is None else self._numbers(value, self.config.num_experts_per_tok, what)

    def _protected(self, value: Any, what: str) -> Tensor | None:
        count = self.config.n_routed_experts
        if not isinstance(value, list):
            self.fail(f"{what} must be a list of expert ids")
        for expert in value:
            self._integer(expert, 0, count - 1, what)
        if not value:
            return None
        return torch.zeros(count, dtype=torch.bool).index_fill_(0, torch.tensor(value), True)

    def _numbers(self, value: Any, count: int, what: str) -> Tensor:
        if not isinstance(value, list) or len(value) != count:
            self.fail(f"{what}: expected {count} numbers")
        return torch.tensor([self._number(number, what) for number in value], dtype=torch.float32)

    def _number(self, value: Any, what: str) -> float:
        if type(value) not in (int, float) or not 0 <= value <= 1e30 or not math.isfinite(value):
            self.fail(f"{what}: expected a number from 0 to 1e30, got {value!r:.40}")
        return float(value)

    def _integer(self, value: Any, low: int, high: int, what: str) -> int:
        if type(value) is not int or not low <= value <= high:
            self.fail(f"{what}: expected an integer from {low} to {high}, got {value!r:.40}")
        return value

    def _choice(self, value: Any, known: Sequence[str], what: str) -> None:
        if value not in known:
            self.fail(f"policy.{what}: expected one of {', '.join(known)}, got {value!r:.40}")


def shipped_folders() -> list[Path]:
    """Where the project's own tables lie: profiles/ of a checkout, share/kttools/profiles of an install."""
    checkout = Path(__file__).resolve().parents[2] / "profiles"
    return [f for f in (checkout, Path(sys.prefix) / "share/kttools/profiles") if f.is_dir()]


def locate_table(
    asked: str | Path | None,
    bundle_path: Callable[[str], Path],
    listed: Sequence[str],
    folders: Sequence[Path] | None = None,
) -> Path | None:
    """Which file a user means: a path, the name of a table, or None for the bundle's default.

    A name is looked up in the bundle, then in `folders` (default: shipped_folders()). bundle_path: from a
    file the manifest lists to where it lies. Returns None for the native router. Raises InvalidInputError for
    what is not there, listing what is.
    """
    if asked == "none":
        return None
    if asked is None:
        return bundle_path(BUNDLE_TABLE) if BUNDLE_TABLE in listed else None
    if Path(asked).exists():
        return Path(asked)
    named = f"{BUNDLE_TABLES}{asked}{SUFFIX}"
    if named in listed:
        return bundle_path(named)
    folders = shipped_folders() if folders is None else folders
    shipped = {_stem(path.name): path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}"))}
    if str(asked) in shipped:
        return shipped[str(asked)]
    names = [_stem(n[len(BUNDLE_TABLES) :]) for n in listed if n.startswith(BUNDLE_TABLES)]
    raise InvalidInputError(
        f"{asked}: no such expert table; tables in this bundle: {', '.join(sorted(names)) or 'none'}; "
        f"tables of the project: {', '.join(sorted(shipped)) or 'none'}"
    )


def _stem(name: str) -> str:
    return name.removesuffix(SUFFIX)
