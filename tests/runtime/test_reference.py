"""The reference path (bf16 weights, float32 activations) against transformers in float32.

Both sides multiply the same numbers in float32; only the order of sums differs. The largest sum here has 384
terms, whose rounding in float32 is of the order sqrt(384) * 2^-24 = 1e-6 per layer: the bar of 2e-5 on logits
is far above that and far below any mistake (see test_planted_error_is_seen).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compare import assert_close, assert_same_distribution, mean_kl
from tests.oracle import CONFIGS, hf_logits, hf_model, runtime_model, text_tokens, trained_model

KL = 1e-5
TOP1 = 0.999
LOGIT_TOL = 2e-5
NUM_TOKENS = 160


def tokens_for(hf: Any, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    return torch.randint(0, hf.config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_random_config(name: str) -> None:
    hf = hf_model(CONFIGS[name])
    tokens = tokens_for(hf)
    reference = hf_logits(hf, tokens)
    logits = runtime_model(hf).logits(tokens)
    assert_close(logits, reference, LOGIT_TOL)
    assert_same_distribution(logits, reference, KL, TOP1)


def test_every_kernel_table(isa: str) -> None:
    hf = hf_model(CONFIGS["odd_sizes"])
    tokens = tokens_for(hf)
    assert_close(runtime_model(hf, isa=isa).logits(tokens), hf_logits(hf, tokens), LOGIT_TOL)


def test_beyond_the_original_context_of_yarn() -> None:
    """64 positions were original: past them interpolated and kept frequencies differ the most."""
    hf = hf_model(CONFIGS["yarn_two_mscales"])
    tokens = tokens_for(hf, 400)
    assert_close(runtime_model(hf).logits(tokens)[64:], hf_logits(hf, tokens)[64:], LOGIT_TOL)


def test_context_longer_than_one_block_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill expands heads in blocks; here every block holds a single head."""
    hf = hf_model(CONFIGS["base"])
    tokens = tokens_for(hf)
    monkeypatch.setattr("kttools_runtime.attention.HEAD_BLOCK_BYTES", 1)
    assert_close(runtime_model(hf).logits(tokens), hf_logits(hf, tokens), LOGIT_TOL)


@pytest.mark.parametrize(
    ("weight", "row"),
    [
        ("model.layers.2.mlp.experts.down_proj", 5),
        ("model.layers.1.mlp.gate.e_score_correction_bias", 3),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", 0),
        ("model.layers.2.self_attn.kv_b_proj.weight", 17),
        ("model.layers.0.self_attn.q_a_layernorm.weight", 1),
    ],
)
def test_planted_error_is_seen(weight: str, row: int) -> None:
    """One row of one tensor shifted: the comparison above must not pass."""
    hf = hf_model(CONFIGS["base"])
    tokens = tokens_for(hf)
    reference = hf_logits(hf, tokens)
    state = hf.state_dict()
    state[weight][row] += 0.5
    logits = runtime_model(hf).logits(tokens)
    with pytest.raises(AssertionError, match="error"):
        assert_close(logits, reference, LOGIT_TOL)
    assert mean_kl(logits, reference) > KL


def test_sample_model(nano_checkpoint: Path, samples_dir: Path) -> None:
    _check_trained(nano_checkpoint, sorted((samples_dir / "text").glob("*.jsonl")), 160)


def test_larger_trained_model(tiny_checkpoint: Path, shared_dir: Path) -> None:
    _check_trained(tiny_checkpoint, sorted((shared_dir / "corpora").glob("*.valid.jsonl")), 256)


def _check_trained(checkpoint: Path, corpora: list[Path], num_tokens: int) -> None:
    assert corpora
    hf = trained_model(checkpoint)
    model = runtime_model(hf)
    sequences = [text_tokens(checkpoint, path, num_tokens) for path in corpora]
    reference = torch.cat([hf_logits(hf, tokens) for tokens in sequences])
    logits = torch.cat([model.logits(tokens) for tokens in sequences])
    assert_same_distribution(logits, reference, KL, TOP1)


def test_configs_vary_everything() -> None:
    """The list above is only as good as its spread."""
    text = json.dumps(CONFIGS)
    assert len(CONFIGS) >= 8
    for key in ("q_lora_rank", "n_group", "norm_topk_prob", "first_k_dense_replace", "n_shared_experts"):
        assert f'"{key}"' in text
    assert {c.get("rope_interleave", True) for c in CONFIGS.values()} == {True, False}
