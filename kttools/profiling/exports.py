"""What other programs can use of a profile: GPU placement, expert counts, and a flat number of experts."""

from pathlib import Path
from typing import Any

import numpy as np

from kttools.bundle.atomic import atomic_write_bytes
from kttools_runtime import strict_json

from .profile_file import Profile

# llama.cpp's name of DeepSeek-V2, V3 and R1 in GGUF files.
LLAMA_ARCHITECTURE = "deepseek2"


def write_exports(profile: Profile, evaluation: dict[str, Any] | None, output: Path) -> list[Path]:
    """gpu-placement.json, logical_count.json and, where there is an evaluation, llama-cpp.json."""
    documents = {
        "gpu-placement.json": gpu_placement(profile),
        "logical_count.json": logical_count(profile),
    }
    if evaluation is not None:
        documents["llama-cpp.json"] = llama_hint(evaluation)
    output.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        atomic_write_bytes(output / name, strict_json.canonical(document))
    return [output / name for name in documents]


def kept_counts(profile: Profile, shares: np.ndarray | None = None) -> np.ndarray:
    """How often each expert is computed, float64 [L, n_routed_experts], domains weighted alike.

    shares: [L, K], the part of tokens that keep the expert of each weight rank (a table's); None: all.
    """
    total: np.ndarray = np.zeros(())
    for _, stats in sorted(profile.stats.items()):
        ranks = stats["rank_histogram"] / stats["tokens"][:, None, None]
        total = total + (ranks if shares is None else ranks * shares[:, None, :]).sum(axis=2)
    return total / len(profile.stats)


def hot_experts(profile: Profile, shares: np.ndarray | None = None) -> dict[str, list[int]]:
    """Experts by how often they are computed, the hottest first: what a GPU should hold."""
    counts = kept_counts(profile, shares)
    layers = profile.header["router"]["moe_layers"]
    return {str(i): (-row).argsort(kind="stable").tolist() for i, row in zip(layers, counts, strict=True)}


def gpu_placement(profile: Profile, shares: np.ndarray | None = None) -> dict[str, Any]:
    """Hot experts with the part of the work that the first n of them take, n = 1, 2, ..."""
    counts = kept_counts(profile, shares)
    covered = np.cumsum(-np.sort(-counts, axis=1), axis=1) / counts.sum(axis=1, keepdims=True)
    layers = profile.header["router"]["moe_layers"]
    return {
        "fingerprint": profile.header["fingerprint"],
        "gpu_hot_experts": hot_experts(profile, shares),
        "covered": {
            str(i): [round(float(v), 6) for v in row] for i, row in zip(layers, covered, strict=True)
        },
    }


def logical_count(profile: Profile) -> dict[str, Any]:
    """How often each expert was chosen: [1, model layers up to the last MoE layer, n_routed_experts].

    SGLang's expert distribution recorder and KTransformers' GPU placement read `logical_count` with one row
    per model layer; layers without experts are rows of zeros.
    """
    router = profile.header["router"]
    count = profile.pooled()["count"]
    rows = np.zeros((max(router["moe_layers"]) + 1, router["n_routed_experts"]), dtype=np.int64)
    rows[router["moe_layers"]] = np.rint(count).astype(np.int64)
    return {"logical_count": [rows.tolist()]}


def llama_hint(evaluation: dict[str, Any], architecture: str = LLAMA_ARCHITECTURE) -> dict[str, Any]:
    """llama.cpp's nearest equivalent of a table, the same k in every layer, with what that was measured to
    cost: here, not in llama.cpp."""
    flat = next(policy for policy in evaluation["policies"] if policy["name"] == "flat")
    k = round(flat["k_mean"])
    return {
        "arguments": llama_override(architecture, k),
        "k": k,
        "measured": {"policy": flat["label"], "k_mean": flat["k_mean"], **flat["metrics"]["pooled"]},
        "reference_k": evaluation["reference"]["k_mean"],
    }


def llama_override(architecture: str, k: int) -> list[str]:
    """The option that sets a flat k."""
    return ["--override-kv", f"{architecture}.expert_used_count=int:{k}"]
