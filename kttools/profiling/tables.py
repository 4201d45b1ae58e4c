"""Expert tables written: from policies by layer to the JSON that kttools_runtime.expert_table reads."""

from pathlib import Path
from typing import Any

from torch import Tensor

from kttools.bundle.atomic import atomic_write_bytes
from kttools_runtime import strict_json
from kttools_runtime.config import ModelConfig
from kttools_runtime.expert_policy import FIXED_KINDS, LayerPolicy
from kttools_runtime.expert_table import FORMAT, VERSION, ExpertTable, parse_table
from kttools_runtime.version import __version__

from .layerwise import Policies


def table_document(
    name: str,
    fingerprint: str,
    config: ModelConfig,
    policies: Policies,
    *,
    k_mean_target: float | None,
    k_mean_expected: dict[str, float],
    placement: dict[str, Any],
    provenance: dict[str, Any],
    certificate: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON of a table; all layers share kind, order, bounds and threshold."""
    first = policies[config.moe_layers[0]]
    norms = {str(i): _numbers(p.norms) for i, p in policies.items()} if first.norms is not None else None
    native = config.num_experts_per_tok
    return {
        "format": FORMAT,
        "version": VERSION,
        "tool": {"name": "kttools", "version": __version__},
        "name": name,
        "fingerprint": fingerprint,
        "policy": {
            "kind": first.kind,
            "k_native": native,
            "k_min": first.k_min,
            "k_max": first.k_max or native,
            "k_mean_target": k_mean_target,
            "k_mean_expected": k_mean_expected,
            "order": first.order,
            "renormalize": first.renormalize,
            "protect_prefix_tokens": 0,
            "threshold": first.threshold,
            "layers": [_layer(index, policies[index]) for index in config.moe_layers],
        },
        "expert_norm": norms,
        "placement": placement,
        "provenance": provenance,
        "certificate": certificate,
    }


def write_table(path: Path, document: dict[str, Any], config: ModelConfig) -> ExpertTable:
    """Writes a table; returns it as the runtime reads it. Raises CorruptFileError where the reader would."""
    data = strict_json.canonical(document)
    table = parse_table(data, str(path), config, None)
    atomic_write_bytes(path, data)
    return table


def _layer(index: int, policy: LayerPolicy) -> dict[str, Any]:
    is_fixed = policy.kind in FIXED_KINDS
    return {
        "layer": index,
        "k": policy.k if is_fixed else None,
        "sigma": None if is_fixed else policy.sigma,
        "alpha": None if policy.alpha is None else _numbers(policy.alpha),
        "ratios": None if policy.ratios is None else _numbers(policy.ratios),
        "protect": [] if policy.protect is None else policy.protect.nonzero()[:, 0].tolist(),
    }


def _numbers(values: Tensor | None) -> list[float]:
    return [] if values is None else [float(v) for v in values]
