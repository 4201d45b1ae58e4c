"""benchmarks/make_slice.py on dimensions small enough to read back."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors import safe_open

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


@pytest.fixture
def make_slice(repo: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_slice", repo / "benchmarks" / "make_slice.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHARD_BYTES", 1 << 20)
    return module


def test_checkpoint_reads_back(make_slice: ModuleType, tmp_path: Path) -> None:
    config = make_slice.slice_config(layers=2, experts=16, vocab=8192) | SMALL
    total = make_slice.write_checkpoint(tmp_path, config, seed=1)
    shapes = {}
    for shard in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            shapes |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert sum(tensor.nbytes for tensor in shapes.values()) == total
    assert shapes["model.layers.1.mlp.experts.15.down_proj.weight"].shape == (64, 32)
    assert shapes["model.layers.1.mlp.gate.e_score_correction_bias"].dtype.itemsize == 4
    assert abs(float(shapes["lm_head.weight"].float().std()) - make_slice.WEIGHT_STD) < 1e-4
    assert bool((shapes["model.norm.weight"] == 1).all())


def test_bytes_do_not_depend_on_the_block(make_slice: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(make_slice.tensor_blocks("a", "BF16", (30, 41), 7)))
    monkeypatch.setattr(make_slice, "BLOCK_ELEMENTS", 100)
    blocks = list(make_slice.tensor_blocks("a", "BF16", (30, 41), 7))
    assert len(blocks) == 13
    assert np.array_equal(np.concatenate(blocks), whole)


def test_bf16_rounds_to_nearest_even(make_slice: ModuleType) -> None:
    values = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(np.float32)
    assert make_slice.to_bf16(values.copy()).tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81]
