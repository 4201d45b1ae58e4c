"""Peak memory of quantising FP8 and GGUF with DeepSeek-V3's true shapes: one expert is decoded at a time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kttools.checkpoint.gguf.types import BY_NAME
from kttools.families import canonical_tensors
from kttools.families.deepseek_v3 import read_config
from kttools.gguf_out.pairs import head_bytes, padding, pair_bytes, tensor_bytes, typed
from tests.checkpoint.fp8_forge import QUANTIZATION
from tests.forge import config
from tests.quantize.test_memory import EXPERTS, HIDDEN, INNER, MEASURE, VOCAB

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 2.5 * (1 << 30)
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


def sparse_fp8(path: Path) -> Path:
    """Codes and scales of zero in a file with holes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(VALUES | {"quantization_config": QUANTIZATION}))
    model, _ = read_config(VALUES, {}, "config.json")
    shapes = {spec.name: spec.shape for spec in canonical_tensors(model)}
    for expert in range(EXPERTS):
        prefix = f"model.layers.1.mlp.experts.{expert}."
        shapes |= {f"{prefix}{name}.weight": (INNER, HIDDEN) for name in ("gate_proj", "up_proj")}
        shapes[f"{prefix}down_proj.weight"] = (HIDDEN, INNER)
    header: dict[str, Any] = {}
    position = 0
    for name, shape in shapes.items():
        is_fp8 = len(shape) == 2 and "mlp.gate." not in name and "embed" not in name and "head" not in name
        entries = [(name, "F8_E4M3" if is_fp8 else "BF16", shape)]
        if is_fp8:
            entries.append((f"{name}_scale_inv", "F32", tuple(-(-side // 128) for side in shape)))
        for entry, dtype, dims in entries:
            size = {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
            for dim in dims:
                size *= dim
            header[entry] = {"dtype": dtype, "shape": dims, "data_offsets": [position, position + size]}
            position += size
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)
    return path


def sparse_gguf(path: Path) -> Path:
    """Q4_K blocks of zeros, experts stacked, in a file with holes."""
    from kttools.checkpoint.gguf.architectures import ARCHITECTURES
    from kttools.checkpoint.gguf.architectures.base import model_keys

    model, _ = read_config(VALUES, {}, "config.json")
    architecture = ARCHITECTURES[0]
    values = model_keys(model, architecture.keys) | architecture.describe(model)
    pairs = {f"deepseek2.{key}": value for key, value in values.items()}
    pairs |= {"general.architecture": "deepseek2", "deepseek2.attention.key_length": 192}
    pairs["deepseek2.attention.value_length"] = 128
    del pairs["deepseek2.attention.key_length_mla"], pairs["deepseek2.attention.value_length_mla"]
    shapes = {spec.name: spec.shape for spec in canonical_tensors(model)}
    prefix = "model.layers.1.mlp.experts."
    shapes |= {prefix + name: (EXPERTS, INNER, HIDDEN) for name in ("gate_proj", "up_proj")}
    shapes[prefix + "down_proj"] = (EXPERTS, HIDDEN, INNER)
    table, position = b"", 0
    for name, shape in shapes.items():
        found = architecture.gguf_name(name)
        assert found is not None, name
        kind = BY_NAME["Q4_K" if len(shape) > 1 and "gate." not in name else "F32"]
        table += tensor_bytes(found[0], kind, shape, position)
        size = kind.row_bytes(shape[-1]) or 0
        for dim in shape[:-1]:
            size *= dim
        position += size + len(padding(size))
    head = head_bytes(len(shapes), len(pairs))
    head += b"".join(pair_bytes(key, typed(value)) for key, value in pairs.items()) + table
    with path.open("wb") as stream:
        stream.write(head + padding(len(head)))
        stream.truncate(stream.tell() + position)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("make", "name"), [(sparse_fp8, "fp8"), (sparse_gguf, "x.gguf")])
def test_peak_memory_is_bounded_and_as_planned(tmp_path: Path, make: Any, name: str) -> None:
    source = make(tmp_path / name)
    line = ["quantize", str(source), "-o", str(tmp_path / "b"), "--workers", "1", "--json", "--quiet"]
    command = [sys.executable, "-c", MEASURE, *line]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stderr)["peak"]
    planned = json.loads(done.stdout)["plan"]["ram_bytes"]
    assert peak < LIMIT
    assert peak < planned, f"{peak / 1e6:.0f} MB used, {planned / 1e6:.0f} MB planned"
