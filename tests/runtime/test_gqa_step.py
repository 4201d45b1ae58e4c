"""Decode of the families with grouped-query attention: native steps against the modules they are made of."""

from pathlib import Path

import pytest
import torch

import kttools_runtime as kt
from tests.compare import assert_same_distribution
from tests.family_oracle import CASES, hf_model, quantize, save, tokens_for
from tests.runtime.test_step import decoded, without_steps

FAMILIES = [family for family in CASES if family != "deepseek_v2"]
MORE = [("qwen3_moe", "bias"), ("qwen2_moe", "window"), ("glm4_moe", "quarter"), ("gpt_oss", "all_windows")]
# Two bf16 paths on random routers (test_step.py has 2e-3 for those).
KL = 2e-3


@pytest.mark.parametrize(("family", "case"), [(family, "odd") for family in FAMILIES] + MORE)
def test_native_decode_equals_modules(family: str, case: str, tmp_path: Path) -> None:
    hf = hf_model(family, case)
    model = kt.load(quantize(save(hf, tmp_path / "hf"), tmp_path / "bundle"), threads=1)
    tokens = tokens_for(hf, 60)
    native = decoded(model, tokens)
    plain = without_steps(model, lambda: decoded(model, tokens))
    assert_same_distribution(native, plain, KL)
    for layer in model.layers:
        assert layer.native is not None
        hidden, cache = torch.ones(1, model.config.hidden_size), model.new_cache(1)
        step = kt.model.Step(0, 1, model._rope.rotations(0, 1))
        assert layer.native.attend(hidden, step, cache.layers[0])
        assert not torch.equal(hidden, torch.ones_like(hidden))
