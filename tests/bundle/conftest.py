"""A small bundle made of random numbers, with the real writer of the manifest and real pack headers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from torch import Tensor

from kttools.bundle.hashing import digest_file, sha256_file
from kttools.bundle.manifest import collect_files, write_manifest
from kttools.families import Role, canonical_tensors
from kttools.families.deepseek_v3 import read_config
from kttools_runtime import _kernels
from kttools_runtime.manifest import ExpertFile
from kttools_runtime.pack import LAYOUT, PackedExpert, PackHeader, header_bytes, header_size
from tests.forge import CONFIG, hub_tensors, save_sharded

FORMAT = "int8"


def write_pack(path: Path, layer: int, seed: int) -> None:
    """A pack whose blobs are noise under right checksums: what verify and inspect look at is all there."""
    hidden, inner, experts = (
        CONFIG[key] for key in ("hidden_size", "moe_intermediate_size", "n_routed_experts")
    )
    size = _kernels.expert_bytes(FORMAT, hidden, inner)
    noise = np.random.default_rng(seed)
    blobs = [noise.integers(0, 256, size, dtype=np.uint8).tobytes() for _ in range(experts)]
    start = header_size(experts)
    table = tuple(
        PackedExpert(_kernels.FORMATS[FORMAT], start + i * size, size, xxhash.xxh3_64_intdigest(blob))
        for i, blob in enumerate(blobs)
    )
    header = PackHeader(start, LAYOUT, experts, hidden, inner, layer, start + experts * size, table)
    path.write_bytes(header_bytes(header) + b"".join(blobs))


def shard_tensors() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Shards with the attention in int8 parts and the rest whole; and the manifest's linears."""
    model, _ = read_config(CONFIG, {}, "config.json")
    whole = hub_tensors(CONFIG)
    tensors: dict[str, Tensor] = {}
    linears: dict[str, str] = {}
    for spec in canonical_tensors(model):
        base = spec.name.removesuffix(".weight")
        if spec.role.is_linear:
            linears[base] = "int8" if spec.role is Role.ATTENTION else "bf16"
        if spec.role is Role.ATTENTION:
            tensors[f"{base}.qweight"] = torch.zeros(spec.shape, dtype=torch.int8)
            tensors[f"{base}.row_scale"] = torch.ones(spec.shape[0])
        else:
            tensors[spec.name] = whole[spec.name]
    return tensors, linears


def sign(root: Path, linears: dict[str, str]) -> None:
    """Writes bundle.json for whatever lies in `root`."""
    model, _ = read_config(CONFIG, {}, "config.json")
    config_file = root.parent / "config.json"
    config_file.write_text(json.dumps(CONFIG))
    source = {"path": "config.json", "bytes": config_file.stat().st_size, "sha256": sha256_file(config_file)}
    write_manifest(
        root,
        config=model,
        source_config=CONFIG,
        source_files=[source],
        recipe={"cpu_format": FORMAT, "gpu_format": "int8", "group_size": 128},
        experts={
            layer: ExpertFile(f"experts/layer-{layer:05d}.ktpack", FORMAT) for layer in model.moe_layers
        },
        linears=linears,
        files={path: digest_file(root / path) for path in collect_files(root)},
    )


@pytest.fixture(scope="session")
def linears() -> dict[str, str]:
    return shard_tensors()[1]


@pytest.fixture(scope="session")
def sound_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    root = tmp_path_factory.mktemp("forged") / "bundle"
    for folder in ("experts", "shards", "tokenizer"):
        (root / folder).mkdir(parents=True)
    for layer in (1, 2):
        write_pack(root / f"experts/layer-{layer:05d}.ktpack", layer, seed=layer)
    tensors, linears = shard_tensors()
    save_sharded(root / "shards", tensors, 2)
    (root / "tokenizer/tokenizer.json").write_text('{"version": "1.0"}')
    (root / "quantization-report.json").write_text("{}")
    sign(root, linears)
    return root


@pytest.fixture
def bundle(sound_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound_bundle, tmp_path / "bundle"))
