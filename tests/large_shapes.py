"""Tensors of DeepSeek-V3's true shapes in files with holes, and the bound on what quantizing them takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from kttools.families import canonical_tensors
from kttools.families.deepseek_v3 import read_config
from kttools_runtime.config import ModelConfig
from tests.forge import config

EXPERTS, VOCAB, HIDDEN, INNER = 3, 16384, 7168, 2048
REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT = 2.5 * (1 << 30)
ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}

MEASURE = """
import json, sys
from kttools.cli import main
from tests.memory import peak_rss_bytes
code = main(sys.argv[1:])
print(json.dumps({"peak": peak_rss_bytes()}), file=sys.stderr)
sys.exit(code)
"""

VALUES = config(
    hidden_size=HIDDEN,
    moe_intermediate_size=INNER,
    intermediate_size=4096,
    vocab_size=VOCAB,
    num_hidden_layers=2,
    n_routed_experts=EXPERTS,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)


def model_config() -> ModelConfig:
    """VALUES as the runtime's config."""
    return read_config(VALUES, {}, "config.json")[0]


def hub_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor under its hub name, one per expert."""
    shapes = {spec.name: spec.shape for spec in canonical_tensors(model_config())}
    for expert in range(EXPERTS):
        prefix = f"model.layers.1.mlp.experts.{expert}."
        shapes |= {f"{prefix}{name}.weight": (INNER, HIDDEN) for name in ("gate_proj", "up_proj")}
        shapes[f"{prefix}down_proj.weight"] = (HIDDEN, INNER)
    return shapes


def write_safetensors(file: Path, tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    """(name, dtype, shape) of zeros, in a file with holes."""
    header: dict[str, Any] = {}
    position = 0
    for name, dtype, shape in tensors:
        size = ITEM_BYTES[dtype]
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)


def check_peak(source: Path, target: Path, workers: int) -> None:
    """Quantizes in a process of its own; its peak must be under LIMIT and under what the plan said."""
    line = ["quantize", str(source), "-o", str(target), "--workers", str(workers), "--json", "--quiet"]
    command = [sys.executable, "-c", MEASURE, *line]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stderr)["peak"]
    planned = json.loads(done.stdout)["plan"]["ram_bytes"]
    assert peak < LIMIT
    assert peak < planned, f"{peak / 1e6:.0f} MB used, {planned / 1e6:.0f} MB planned"
