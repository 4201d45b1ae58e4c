"""Every family, from a checkpoint through quantize and a bundle to logits, against transformers in float32.

Reference path: bf16 packs and shards hold the oracle's numbers exactly, activations are float32, so only the
order of sums differs (see test_reference): 2e-5 on logits, and a mean KL of the order of its square.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import kttools_runtime as kt
from kttools.bundle.verify import verify_bundle
from kttools.families import open_model
from kttools_runtime.gqa import QUERY_BLOCK_TOKENS
from kttools_runtime.manifest import load_manifest
from kttools_runtime.model import Model
from tests.compare import assert_close, assert_same_distribution, mean_kl
from tests.family_oracle import (
    ALL_CASES,
    CASES,
    FIRST_CASES,
    hf_model,
    quantize,
    reference_model,
    save,
    tokens_for,
)
from tests.oracle import hf_logits

LOGIT_TOL = 2e-5
KL = 1e-10
CACHE_TOL = 1e-5
# Random routers send tokens elsewhere at the smallest change: twice what was measured (another seed: 1.0).
QUANTIZED_KL = {"int8": 0.015, "int4": 0.13}
DEFAULT_DTYPE_KL = 0.005
PATHS = [*FIRST_CASES, ("qwen3_moe", "window"), ("qwen2_moe", "window"), ("glm4_moe", "yarn")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """models(family, case) -> oracle, runtime's model; made once."""

    @cache
    def made(family: str, case: str) -> tuple[Any, Model]:
        hf = hf_model(family, case)
        return hf, reference_model(hf, tmp_path_factory.mktemp(f"{family}-{case}"))

    return made


@pytest.mark.parametrize(("family", "case"), ALL_CASES)
def test_logits(models: Any, family: str, case: str) -> None:
    hf, model = models(family, case)
    tokens = tokens_for(hf)
    reference = hf_logits(hf, tokens)
    logits = model.logits(tokens)
    assert_close(logits, reference, LOGIT_TOL)
    assert_same_distribution(logits, reference, KL)


@pytest.mark.parametrize(("family", "case"), PATHS)
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunks_equal_whole(models: Any, family: str, case: str, chunk_size: int) -> None:
    hf, model = models(family, case)
    tokens = tokens_for(hf)
    assert_close(model.logits(tokens, chunk_size), model.logits(tokens), CACHE_TOL)


@pytest.mark.parametrize(("family", "case"), PATHS)
def test_decode_equals_prefill(models: Any, family: str, case: str) -> None:
    hf, model = models(family, case)
    tokens = tokens_for(hf, 80)
    cache = model.new_cache(80)
    rows = [model.prefill(tokens[:50], cache)]
    rows += [model.decode(int(token), cache) for token in tokens[50:]]
    assert_close(torch.stack(rows), model.logits(tokens)[49:], CACHE_TOL)
    cache.truncate(50)
    assert_close(model.decode(int(tokens[50]), cache), rows[1], CACHE_TOL)


@pytest.mark.parametrize(("family", "case"), FIRST_CASES)
def test_greedy_text(models: Any, family: str, case: str) -> None:
    hf, model = models(family, case)
    prompt = tokens_for(hf, 12)
    expected = hf.generate(prompt[None], max_new_tokens=16, do_sample=False, eos_token_id=None)[0, 12:]
    assert list(model.generate(prompt.tolist(), 16, stop_ids=())) == expected.tolist()


@pytest.mark.parametrize(("family", "case"), [case for case in FIRST_CASES if case[0] != "gpt_oss"])
def test_both_dialects_give_one_bundle(tmp_path: Path, family: str, case: str) -> None:
    """The hub's one tensor per expert, and the stacked ones transformers 5 saves: the same bytes."""
    hf = hf_model(family, case)
    bundles = []
    for is_hub_names in (True, False):
        folder = tmp_path / str(is_hub_names)
        checkpoint = save(hf, folder / "hf", is_hub_names)
        source = open_model(checkpoint)
        layer = source.moe_layers[-1]
        assert ("stacked" in source.expert_layout(layer)) is not is_hub_names
        bundles.append(load_manifest(quantize(checkpoint, folder / "bundle", "int8", "int4")))
    hub, own = ({p: f.sha256 for p, f in b.files.items() if "report" not in p} for b in bundles)
    assert hub == own
    assert bundles[0].model == bundles[1].model


@pytest.mark.parametrize(("family", "case"), FIRST_CASES)
def test_quantized(tmp_path: Path, family: str, case: str) -> None:
    """int8 and int4 bundles verify, run in the default dtype and stay near the full model."""
    hf = hf_model(family, case)
    checkpoint = save(hf, tmp_path / "hf")
    tokens = tokens_for(hf)
    reference = hf_logits(hf, tokens)
    for name, bound in QUANTIZED_KL.items():
        bundle = quantize(checkpoint, tmp_path / name, name, name)
        assert not verify_bundle(bundle).problems
        model = kt.load(bundle, threads=1)
        assert_same_distribution(model.logits(tokens), reference, bound)
        assert len(list(model.generate(tokens[:9].tolist(), 4, stop_ids=()))) == 4


@pytest.mark.parametrize(("family", "case"), [*FIRST_CASES, ("qwen3_moe", "window")])
def test_decode_in_the_default_dtype(tmp_path: Path, family: str, case: str) -> None:
    """Inputs and cache in bf16, the layers' native halves where there are: a few tokens route elsewhere."""
    hf = hf_model(family, case)
    model = kt.load(quantize(save(hf, tmp_path / "hf"), tmp_path / "bundle"), threads=1)
    tokens = tokens_for(hf)
    cache = model.new_cache(len(tokens))
    rows = [model.prefill(tokens[:1], cache)]
    rows += [model.decode(int(token), cache) for token in tokens[1:]]
    assert_same_distribution(torch.stack(rows), hf_logits(hf, tokens), DEFAULT_DTYPE_KL)


PLANTED = [
    ("deepseek_v2", "groups", "model.layers.1.mlp.gate.weight", 3),
    ("deepseek_v2", "bias_eps", "model.layers.1.self_attn.kv_a_proj_with_mqa.bias", 2),
    ("qwen3_moe", "base", "model.layers.1.self_attn.q_norm.weight", 5),
    ("qwen3_moe", "base", "model.layers.1.self_attn.k_norm.weight", 20),
    ("qwen3_moe", "bias", "model.layers.1.self_attn.o_proj.bias", 7),
    ("qwen2_moe", "base", "model.layers.2.self_attn.k_proj.bias", 30),
    ("qwen2_moe", "base", "model.layers.2.self_attn.v_proj.bias", 11),
    ("qwen2_moe", "base", "model.layers.0.mlp.shared_expert_gate.weight", 0),
    ("mixtral", "base", "model.layers.1.mlp.gate.weight", 1),
    ("mixtral", "base", "model.layers.1.mlp.experts.down_proj", 4),
    ("glm4_moe", "air", "model.layers.1.mlp.gate.e_score_correction_bias", 3),
    ("glm4_moe", "air", "model.layers.1.self_attn.q_proj.bias", 13),
    ("glm4_moe", "qk_norm", "model.layers.2.self_attn.k_norm.weight", 17),
    ("gpt_oss", "base", "model.layers.1.self_attn.sinks", 2),
    ("gpt_oss", "base", "model.layers.2.mlp.router.bias", 6),
    ("gpt_oss", "base", "model.layers.0.mlp.experts.gate_up_proj_bias", 5),
    ("gpt_oss", "base", "model.layers.1.mlp.experts.down_proj_bias", 7),
]


@pytest.mark.parametrize(("family", "case", "weight", "row"), PLANTED)
def test_planted_error_is_seen(models: Any, family: str, case: str, weight: str, row: int) -> None:
    """One row of one tensor of the oracle shifted: the comparison above must not pass."""
    hf, model = models(family, case)
    tokens = tokens_for(hf)
    tensor = hf.state_dict()[weight]
    kept = tensor[row].clone()
    try:
        tensor[row] += 0.5
        changed = hf_logits(hf, tokens)
    finally:
        tensor[row] = kept
    with pytest.raises(AssertionError, match="error"):
        assert_close(model.logits(tokens), changed, LOGIT_TOL)
    assert mean_kl(model.logits(tokens), changed) > KL


def test_deepseek_v2_normalises_as_its_own_code_does(tmp_path: Path) -> None:
    """transformers ignores norm_topk_prob; DeepSeek's code divides by the sum instead of scaling."""
    hf = hf_model("deepseek_v2", "groups")
    hf.config.norm_topk_prob = True
    model = reference_model(hf, tmp_path)
    for layer in hf.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(_normalise)
    tokens = tokens_for(hf)
    assert_close(model.logits(tokens), hf_logits(hf, tokens), LOGIT_TOL)


def _normalise(_module: Any, _inputs: Any, output: Any) -> Any:
    logits, weights, ids = output
    return logits, functional.normalize(weights, p=1, dim=-1), ids


def test_queries_of_several_blocks(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill on cached context, and within a window, goes through blocks; here of 5 queries, 1 key head."""
    monkeypatch.setattr("kttools_runtime.gqa.QUERY_BLOCK_TOKENS", 5)
    monkeypatch.setattr("kttools_runtime.gqa.HEAD_BLOCK_BYTES", 1)
    for case in ("base", "window"):
        hf, model = models("qwen3_moe", case)
        tokens = tokens_for(hf)
        reference = hf_logits(hf, tokens)
        assert_close(model.logits(tokens), reference, LOGIT_TOL)
        assert_close(model.logits(tokens, 33), reference, LOGIT_TOL)


def test_no_scores_of_all_pairs(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask covers at most a block of queries, and torch takes its flash kernel, never plain scores."""
    masks: list[int] = []
    attend = functional.scaled_dot_product_attention

    def watched(query: Any, key: Any, value: Any, **options: Any) -> Any:
        mask = options.get("attn_mask")
        masks.append(0 if mask is None else mask.shape[0])
        backend = torch._fused_sdp_choice(query, key, value, **options)
        assert backend == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
        return attend(query, key, value, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    for case in ("base", "window"):
        _, model = models("qwen3_moe", case)
        cache = model.new_cache(1401)
        tokens = torch.arange(1400) % 200
        model.prefill(tokens[:700], cache, chunk_size=700)
        model.prefill(tokens[700:], cache, chunk_size=700)
        model.decode(5, cache)
    assert 0 < max(masks) <= QUERY_BLOCK_TOKENS < 700


def test_cases_vary_what_matters() -> None:
    """The lists are only as good as their spread."""
    text = {family: str(cases) for family, cases in CASES.items()}
    for family, keys in {
        "deepseek_v2": ("topk_method", "q_lora_rank", "routed_scaling_factor", "rope_parameters"),
        "qwen3_moe": ("norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "sliding_window"),
        "qwen2_moe": (
            "qkv_bias",
            "mlp_only_layers",
            "decoder_sparse_step",
            "shared_expert_intermediate_size",
        ),
        "mixtral": ("head_dim", "sliding_window", "num_experts_per_tok"),
        "gpt_oss": ("swiglu_limit", "swiglu_alpha", "layer_types", "sliding_window", "attention_bias"),
        "glm4_moe": ("use_qk_norm", "attention_bias", "partial_rotary_factor", "n_group"),
    }.items():
        assert not [key for key in keys if f"'{key}'" not in text[family]]
