"""Peak memory on tensors of DeepSeek-V3's true shapes: experts of 3 x 14.68 M weights, a long head."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forge import config

EXPERTS, VOCAB, HIDDEN, INNER = 3, 16384, 7168, 2048
REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 2.5 * (1 << 30)

MEASURE = """
import json, sys
from kttools.cli import main
from tests.memory import peak_rss_bytes
code = main(sys.argv[1:])
print(json.dumps({"peak": peak_rss_bytes()}), file=sys.stderr)
sys.exit(code)
"""


def sparse_checkpoint(path: Path) -> Path:
    """Weights of zero in a file with holes: a GB to read, nothing on the disk."""
    values = config(
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
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values))
    write_sparse(path / "model.safetensors", values)
    return path


def write_sparse(file: Path, values: dict) -> None:
    from kttools.families import canonical_tensors
    from kttools.families.deepseek_v3 import read_config

    model, _ = read_config(values, {}, "config.json")
    shapes = {spec.name: spec.shape for spec in canonical_tensors(model)}
    for expert in range(EXPERTS):
        prefix = f"model.layers.1.mlp.experts.{expert}."
        shapes |= {f"{prefix}{name}.weight": (INNER, HIDDEN) for name in ("gate_proj", "up_proj")}
        shapes[f"{prefix}down_proj.weight"] = (HIDDEN, INNER)
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_peak_memory_is_bounded_and_as_planned(tmp_path: Path, workers: int) -> None:
    source = sparse_checkpoint(tmp_path / "source")
    assert (source / "model.safetensors").stat().st_size > 8e8
    options = ["--workers", str(workers), "--json", "--quiet"]
    line = ["quantize", str(source), "-o", str(tmp_path / "b"), *options]
    command = [sys.executable, "-c", MEASURE, *line]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stderr)["peak"]
    planned = json.loads(done.stdout)["plan"]["ram_bytes"]
    assert peak < LIMIT
    assert peak < planned, f"{peak / 1e6:.0f} MB used, {planned / 1e6:.0f} MB planned"
