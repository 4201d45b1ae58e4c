"""What other programs can use of a profile: expert counts, and a flat number of experts."""

from typing import Any

import numpy as np

from .profile_file import Profile


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


def llama_override(architecture: str, k: int) -> list[str]:
    """llama.cpp's nearest equivalent of a table: the same flat k in every layer."""
    return ["--override-kv", f"{architecture}.expert_used_count=int:{k}"]
