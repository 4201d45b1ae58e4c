"""The layer-by-layer runner of profiling on grouped-query and MLA families, and tables on their routers."""

from pathlib import Path

import pytest
import torch

from kttools.profiling.layerwise import LayerRunner, forward
from kttools_runtime.expert_policy import LayerPolicy
from tests.compare import assert_close
from tests.family_oracle import hf_model, reference_model, tokens_for

CASES = [("deepseek_v2", "groups"), ("qwen3_moe", "window"), ("qwen2_moe", "base"), ("glm4_moe", "air")]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_layer_by_layer_equals_the_model(tmp_path: Path, family: str, case: str) -> None:
    hf = hf_model(family, case)
    model = reference_model(hf, tmp_path)
    runner = LayerRunner(model)
    tokens = tokens_for(hf, 60)
    assert_close(runner.logits(forward(runner, tokens, {})), model.logits(tokens), 1e-5)


def test_a_table_that_keeps_all_changes_nothing(tmp_path: Path) -> None:
    hf = hf_model("qwen3_moe", "base")
    model = reference_model(hf, tmp_path)
    tokens = tokens_for(hf, 40)
    native = model.logits(tokens)
    for router in (layer.router for layer in model.moe_layers.values()):
        router.table = LayerPolicy(kind="static", k=3)
    assert_close(model.logits(tokens), native, 1e-6)
    for router in (layer.router for layer in model.moe_layers.values()):
        router.table = LayerPolicy(kind="static", k=2, renormalize=True)
    assert not torch.equal(model.logits(tokens), native)
    assert len(model.fingerprint()) == 64
