"""config.json of every family to canonical config: released models, variants, and every refusal."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kttools.cli import main
from kttools.families import canonical_tensors, detect
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError, UnsupportedModelError
from kttools_runtime.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from tests.families.released import RELEASED

LITE, V2, QWEN3, QWEN2 = "DeepSeek-V2-Lite", "DeepSeek-V2", "Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B"
MIXTRAL, GLM, AIR = "Mixtral-8x7B", "GLM-4.5", "GLM-4.5-Air"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def read_all(name: str, **changes: Any) -> tuple[ModelConfig, list[str]]:
    """A released config with keys changed; a value of ... removes the key."""
    values = copy.deepcopy(RELEASED[name][0]) | changes
    values = {key: value for key, value in values.items() if value is not ...}
    return detect(values).read_config(values, {}, "config.json")


def read(name: str, **changes: Any) -> ModelConfig:
    return read_all(name, **changes)[0]


@pytest.mark.parametrize("name", RELEASED)
def test_released(name: str) -> None:
    """Every key is understood, and the tensors of the table are as many parameters as the authors state."""
    model, notices = read_all(name)
    mtp = "num_nextn_predict_layers 1: multi-token-prediction layers are left out"
    assert notices == ([mtp] if "GLM" in name else [])
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    total = sum(spec.elements for spec in canonical_tensors(model))
    total += len(model.moe_layers) * model.n_routed_experts * expert
    assert total == pytest.approx(RELEASED[name][1] * 1e9, rel=0.01 if "GLM" in name else 0.002)


def test_deepseek_v2() -> None:
    lite, full = read(LITE), read(V2)
    for model in (lite, full):
        assert (model.attention, model.router) == ("mla", "softmax_groups")
        assert model.norm_topk_prob is False
        assert model.rope_interleave is True
        assert model.latent_norm_eps is None
        assert model.rope_cos_sin_scale == 1.0
        assert model.softmax_scale > model.qk_head_dim**-0.5
    assert (lite.n_group, lite.topk_group, lite.routed_scaling_factor) == (1, 1, 1.0)
    assert (full.n_group, full.topk_group, full.routed_scaling_factor) == (8, 3, 16.0)
    assert lite.moe_layers == tuple(range(1, 27))
    assert read(LITE, n_group=None, topk_group=...) == lite
    assert read(LITE, topk_method=...) == lite
    assert read(LITE, n_group=8, topk_group=3) == lite  # greedy looks at all experts
    assert read(LITE, rms_norm_eps=1e-5).latent_norm_eps == 1e-6


def test_deepseek_v2_normalises_or_scales() -> None:
    model, notices = read_all(V2, norm_topk_prob=True)
    assert (model.norm_topk_prob, model.routed_scaling_factor) == (True, 1.0)
    assert any("normalised and not scaled" in notice for notice in notices)
    single = read(V2, norm_topk_prob=True, num_experts_per_tok=1)
    assert (single.norm_topk_prob, single.routed_scaling_factor) == (False, 16.0)


def test_qwen3() -> None:
    model = read(QWEN3)
    assert (model.attention, model.router, model.norm_topk_prob) == ("gqa", "softmax_groups", True)
    assert (model.qk_rope_head_dim, model.qk_nope_head_dim, model.v_head_dim) == (128, 0, 128)
    assert model.qk_norm is True
    assert {model.attention_bias, model.attention_output_bias, model.shared_expert_gate} == {False}
    assert (model.n_shared_experts, model.sliding_window, model.rope_interleave) == (0, None, False)
    biased = read(QWEN3, attention_bias=True)
    assert biased.attention_bias
    assert biased.attention_output_bias
    assert read(QWEN3, sliding_window=4096) == model
    window = read(QWEN3, sliding_window=4096, use_sliding_window=True)
    assert (window.sliding_window, window.sliding_window_layers) == (4096, tuple(range(48)))
    assert read(QWEN3, head_dim=...).v_head_dim == 64
    assert read(QWEN3, norm_topk_prob=...).norm_topk_prob is False
    assert read(QWEN3, num_experts=..., num_local_experts=128) == model


def test_moe_layers_of_qwen() -> None:
    assert read(QWEN3).moe_layers == tuple(range(48))
    assert read(QWEN3, decoder_sparse_step=3, num_hidden_layers=9).moe_layers == (2, 5, 8)
    assert read(QWEN3, mlp_only_layers=[0, 5], num_hidden_layers=7).moe_layers == (1, 2, 3, 4, 6)
    assert read(QWEN2, mlp_only_layers=None, num_hidden_layers=2).moe_layers == (0, 1)


def test_qwen2() -> None:
    model = read(QWEN2)
    assert (model.attention_bias, model.attention_output_bias, model.qk_norm) == (True, False, False)
    assert (model.n_shared_experts, model.shared_intermediate_size) == (1, 5632)
    assert model.shared_expert_gate is True
    assert model.sliding_window is None
    assert read(QWEN2, qkv_bias=True) == model
    assert read(QWEN2, qkv_bias=False).attention_bias is False
    types = ["full_attention", "sliding_attention"] * 12
    window = read(QWEN2, use_sliding_window=True, layer_types=types)
    assert (window.sliding_window, window.sliding_window_layers) == (32768, tuple(range(1, 24, 2)))
    assert read(QWEN2, layer_types=["full_attention"] * 24, sliding_window=0) == model
    full = read(QWEN2, layer_types=["full_attention"] * 24, use_sliding_window=True)
    assert full == model


def test_mixtral() -> None:
    model = read(MIXTRAL)
    assert model.moe_layers == tuple(range(32))
    assert (model.moe_intermediate_size, model.v_head_dim, model.num_key_value_heads) == (14336, 128, 8)
    assert (model.norm_topk_prob, model.n_shared_experts, model.qk_norm) == (True, 0, False)
    assert read(MIXTRAL, rope_theta=..., rms_norm_eps=...) == model
    assert read(MIXTRAL, head_dim=None) == model
    window = read(MIXTRAL, sliding_window=4096)
    assert (window.sliding_window, len(window.sliding_window_layers)) == (4096, 32)


def test_glm() -> None:
    full, air = read(GLM), read(AIR)
    for model in (full, air):
        assert (model.attention, model.router) == ("gqa", "sigmoid_bias_groups")
        assert (model.qk_rope_head_dim, model.qk_nope_head_dim, model.v_head_dim) == (64, 64, 128)
        assert (model.attention_bias, model.attention_output_bias) == (True, False)
        assert model.shared_expert_gate is False
        assert model.eos_token_ids == (151329, 151336, 151338)
    assert (full.qk_norm, air.qk_norm) == (True, False)
    assert (full.moe_layers[0], air.moe_layers[0]) == (3, 1)
    assert read(GLM, partial_rotary_factor=..., n_group=..., topk_group=...) == full
    parameters = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    in_5 = read(GLM, rope_parameters=parameters, rope_theta=..., partial_rotary_factor=...)
    assert in_5.qk_rope_head_dim == 32


@pytest.mark.parametrize("name", [QWEN3, QWEN2, MIXTRAL, GLM])
def test_rope_kinds_of_gqa(name: str) -> None:
    yarn = read(name, rope_scaling=YARN).rope_scaling
    assert isinstance(yarn, YarnScaling)
    assert (yarn.factor, yarn.beta_fast, yarn.beta_slow) == (4.0, 32.0, 1.0)
    assert read(name, rope_scaling={"type": "linear", "factor": 2}).rope_scaling == LinearScaling(2.0)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert read(name, rope_scaling=llama3, max_position_embeddings=8192).rope_scaling == expected


SHARED_UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: this version runs only silu"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
    ({"rope_scaling": YARN | {"short_factor": [1]}}, "short_factor .* not a key of yarn rope"),
    ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0 is not supported: it changes results"),
    ({"mlp_bias": True}, "mlp_bias True is not supported: it changes results and .* has no such key"),
    ({"swiglu_limit": 7.0}, "swiglu_limit 7.0 is not supported"),
    ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config .* not supported"),
    ({"original_max_position_embeddings": 4096}, "original_max_position_embeddings 4096 is not supported"),
]
UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    *((name, *case) for name in (LITE, QWEN3, QWEN2, MIXTRAL, GLM) for case in SHARED_UNSUPPORTED),
    (LITE, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' .* runs only greedy or group_limited_greedy"),
    (LITE, {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' .* runs only softmax"),
    (LITE, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear' .* only default or yarn"),
    (LITE, {"sliding_window": 9}, "sliding_window 9 is not supported: .* DeepSeek-V2 has no such key"),
    (LITE, {"head_dim": 128}, "head_dim 128 is not supported: it follows from the other sizes as 64"),
    (QWEN3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    (QWEN3, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "not a key of default rope"),
    (QWEN3, {"qkv_bias": True}, "qkv_bias True is not supported: .* Qwen3-MoE has no such key"),
    (QWEN3, {"layer_types": ["full_attention"]}, "layer_types .* is not supported"),
    (QWEN2, {"attention_bias": True}, "attention_bias True is not supported"),
    (QWEN2, {"use_sliding_window": True}, "layer_types must say which layers have the window"),
    (QWEN2, {"layer_types": ["linear_attention"]}, "layer_types 'linear_attention' is not supported"),
    (MIXTRAL, {"attention_bias": True}, "attention_bias True is not supported"),
    (GLM, {"scoring_func": "softmax"}, "scoring_func 'softmax' .* runs only sigmoid"),
    (GLM, {"sliding_window": 128}, "sliding_window 128 is not supported"),
]


@pytest.mark.parametrize(("name", "changes", "message"), UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_refuses_what_it_cannot_run(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(name, **changes)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (V2, {"n_group": None}, "n_group must be an integer with topk_method group_limited_greedy, got None"),
    (V2, {"n_group": 7}, "n_group must be a divisor of n_routed_experts 160"),
    (V2, {"norm_topk_prob": None}, "norm_topk_prob must be true or false, got None"),
    (QWEN3, {"num_key_value_heads": 5}, "num_key_value_heads must be a divisor of num_attention_heads 32"),
    (QWEN3, {"head_dim": ..., "num_attention_heads": 30}, "num_attention_heads must be a divisor of hidden"),
    (QWEN3, {"head_dim": 127}, "qk_rope_head_dim must be an even number, got 127"),
    (QWEN3, {"head_dim": 10**400}, "head_dim must be an integer in 1..2147483647, got 1000"),
    (QWEN3, {"head_dim": 0}, "head_dim must be an integer in 1..2147483647, got 0"),
    (QWEN3, {"head_dim": "128"}, "head_dim must be an integer or null"),
    (QWEN3, {"num_local_experts": 64}, "num_local_experts must be 128 as num_experts, got 64"),
    (QWEN3, {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, got 0"),
    (QWEN3, {"mlp_only_layers": 3}, "mlp_only_layers must be a list of integers or null, got 3"),
    (QWEN3, {"mlp_only_layers": ["3"]}, "mlp_only_layers must be a list of integers or null"),
    (QWEN3, {"num_hidden_layers": 10**12}, "num_hidden_layers must be an integer in 1..4096"),
    (QWEN3, {"num_experts_per_tok": 129}, "num_experts_per_tok must be at most 128"),
    (QWEN3, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be null or an integer"),
    (QWEN2, {"layer_types": "full_attention"}, "layer_types must be a list of strings or null"),
    (QWEN2, {"layer_types": [1] * 24}, "layer_types must be a list of strings or null"),
    (
        QWEN2,
        {"layer_types": ["full_attention"]},
        "layer_types must be one name for each of num_",
    ),
    (MIXTRAL, {"sliding_window": -1}, "sliding_window must be null or an integer"),
    (GLM, {"partial_rotary_factor": 0.0}, "partial_rotary_factor must be a number above 0 and at most 1"),
    (GLM, {"partial_rotary_factor": 1.5}, "partial_rotary_factor must be a number above 0 and at most 1"),
    (GLM, {"partial_rotary_factor": 0.1, "head_dim": 10}, "qk_rope_head_dim must be an even number, got 1"),
    (
        GLM,
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
        "high_freq_factor must be above low_freq_factor 4",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_refuses_what_makes_no_sense(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read(name, **changes)


REQUIRED: dict[str, tuple[str, ...]] = {
    LITE: ("n_routed_experts", "n_shared_experts", "kv_lora_rank", "q_lora_rank", "routed_scaling_factor"),
    QWEN3: ("num_experts", "moe_intermediate_size", "num_experts_per_tok"),
    QWEN2: ("num_experts", "shared_expert_intermediate_size"),
    MIXTRAL: ("num_local_experts", "intermediate_size", "num_experts_per_tok"),
    GLM: ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor"),
}
EVERYWHERE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, keys in REQUIRED.items() for key in (*keys, *EVERYWHERE)]
)
def test_sizes_are_required(name: str, key: str) -> None:
    with pytest.raises(InvalidInputError, match=f"config.json: required key {key} is missing"):
        read(name, **{key: ...})


@pytest.mark.parametrize("name", RELEASED)
def test_detection_by_model_type(name: str) -> None:
    values = RELEASED[name][0]
    by_type = {key: value for key, value in values.items() if key != "architectures"}
    assert detect(by_type) is detect(values)


@pytest.mark.parametrize("name", [LITE, QWEN3, QWEN2, MIXTRAL, GLM])
def test_a_refusal_is_one_line_and_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[name][0] | {"hidden_act": "gelu"}))
    assert main(["quantize", str(tmp_path), "-o", str(tmp_path / "bundle")]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().count("\n") == 0
    assert f"{tmp_path / 'config.json'}: hidden_act 'gelu' is not supported" in captured.err


JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.sampled_from([10**400, -(10**400), 2**31, 2**63, 1e308, -1.0, 0.0, 0.5, [], [1], ["x"], {}, "yarn"]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
)
ROPE_NAMES = ("type", "rope_type", "factor", "partial_rotary_factor", "original_max_position_embeddings")


@settings(max_examples=600, deadline=None)
@given(
    name=st.sampled_from(sorted(RELEASED)),
    changes=st.dictionaries(st.integers(0, 60), JSON_VALUES, min_size=1, max_size=4),
    rope=st.dictionaries(st.sampled_from(ROPE_NAMES), JSON_VALUES, max_size=4),
)
def test_hostile_values_are_read_or_refused(name: str, changes: dict[int, Any], rope: dict[str, Any]) -> None:
    """Any JSON under any key gives a config or InvalidInputError, never another exception."""
    values = copy.deepcopy(RELEASED[name][0])
    keys = sorted(set(values) - {"architectures", "model_type"} | {"head_dim", "layer_types", "n_group"})
    for index, value in changes.items():
        values[keys[index % len(keys)]] = value
    if rope:
        values["rope_scaling"] = rope
    try:
        model, _ = detect(values).read_config(values, {}, "config.json")
    except InvalidInputError:
        return
    assert ModelConfig.from_dict(model.to_dict()) == model
