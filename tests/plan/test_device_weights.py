"""What a plan says of weights on devices against the tensors that a load puts there, on simulated devices."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import kttools_runtime as kt
from kttools.plan.choice import Choice, needs_of, open_subject
from kttools.plan.memory import Machine
from kttools_runtime.hybrid.hot_request import HotRequest
from tests.family_oracle import CASES, hf_model, quantize, save

# Sizes of no other test: random models that no constant was fitted to.
SIZES: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 2003,
}
MODELS = {
    "qwen3_moe": SIZES | {"moe_intermediate_size": 96, "num_experts": 12, "head_dim": 64},
    "glm4_moe": SIZES | {"moe_intermediate_size": 160, "n_routed_experts": 10, "head_dim": 32},
    "gpt_oss": SIZES | {"intermediate_size": 192, "num_local_experts": 6, "head_dim": 64},
}


def live_bytes() -> int:
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("hot", [0, 3])
def test_live_tensors_are_the_planned_weights(family: str, hot: int, tmp_path: Path) -> None:
    """The embedding stays in RAM; the rest is on two devices, hot experts in int4 among it: within 2 %."""
    hf = hf_model(family, next(iter(CASES[family])), **MODELS[family])
    bundle = quantize(save(hf, tmp_path / "hf"), tmp_path / "b", "int8", "int4")
    del hf
    choice = Choice(None, None, 64, "off", 1, HotRequest(hot, {}))
    needs = needs_of(open_subject(bundle), choice, Machine(1 << 40, (1 << 40,) * 2, 1))
    planned = sum(device.weight_bytes + device.hot_experts for device in needs.devices)
    before = live_bytes()
    model = kt.load(bundle, device="cpu,cpu", threads=1, cache_len=64, prefill="cpu", gpu_experts=str(hot))
    embedding = 0 if model.config.tie_word_embeddings else needs.ram.dense
    held = live_bytes() - before - embedding
    assert abs(held - planned) <= 0.02 * planned, (held, planned)
