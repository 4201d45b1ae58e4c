"""config.json to canonical config: defaults, variants of the family, and every refusal with its reason."""

import math
from typing import Any

import pytest

from kttools.families import detect
from kttools.families.deepseek_v3 import read_config
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError, UnsupportedModelError
from tests.forge import config

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def read(**changes: Any) -> ModelConfig:
    return read_config(config(**changes), {}, "config.json")[0]


def notices(**changes: Any) -> list[str]:
    return read_config(config(**changes), {}, "config.json")[1]


def test_canonical_values() -> None:
    model = read()
    assert model.moe_layers == (1, 2)
    assert (model.attention, model.router, model.hidden_act) == ("mla", "sigmoid_bias_groups", "silu")
    assert (model.n_shared_experts, model.shared_intermediate_size) == (2, 24)
    assert model.rope_theta == 10000.0
    assert model.rope_interleave is True
    assert model.rope_scaling is None
    assert model.eos_token_ids == (1,)
    assert model.softmax_scale == pytest.approx(10**-0.5)
    assert ModelConfig.from_dict(model.to_dict()) == model
    assert notices() == []


def test_documented_defaults() -> None:
    absent = (
        "moe_layer_freq",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "hidden_act",
        "rope_theta",
    )
    more = (
        "scoring_func",
        "topk_method",
        "norm_topk_prob",
        "num_key_value_heads",
        "bos_token_id",
        "eos_token_id",
    )
    model = read(**dict.fromkeys((*absent, *more), ...))
    expected = read(bos_token_id=None, eos_token_id=None)
    assert model == expected


REQUIRED = [
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("max_position_embeddings", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
    *("qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
    *("n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace"),
]


@pytest.mark.parametrize("key", REQUIRED)
def test_sizes_are_required(key: str) -> None:
    with pytest.raises(InvalidInputError, match=f"config.json: required key {key} is missing"):
        read(**{key: ...})


@pytest.mark.parametrize("key", [key for key in REQUIRED if key != "routed_scaling_factor"])
@pytest.mark.parametrize("value", [1.5, "8", True, [1], -1])
def test_sizes_are_integers_in_range(key: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=key):
        read(**{key: value})


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({"first_k_dense_replace": 0}, (0, 1, 2)),
        ({"first_k_dense_replace": 3}, ()),
        ({"first_k_dense_replace": 9}, ()),
        ({"num_hidden_layers": 6, "moe_layer_freq": 2}, (2, 4)),
    ],
)
def test_moe_layers(changes: dict[str, Any], moe_layers: tuple[int, ...]) -> None:
    assert read(**changes).moe_layers == moe_layers


def test_variants() -> None:
    assert read(q_lora_rank=None).q_lora_rank is None
    assert read(n_shared_experts=0).n_shared_experts == 0
    assert read(n_shared_experts=None).n_shared_experts == 0
    assert read(norm_topk_prob=False).norm_topk_prob is False
    assert read(n_group=1, topk_group=1).n_group == 1
    assert read(tie_word_embeddings=True).tie_word_embeddings is True
    assert read(attention_bias=True).attention_bias is True
    assert read(rope_interleave=False).rope_interleave is False
    assert read(num_key_value_heads=None).num_key_value_heads == 2
    assert (read().latent_norm_eps, read(rms_norm_eps=1e-5).latent_norm_eps) == (None, 1e-6)
    assert read(model_type="kimi_k2").num_hidden_layers == 3


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (1, {}, (1,)),
        ([1, 3], {}, (1, 3)),
        (None, {}, ()),
        (1, {"eos_token_id": [3, 1]}, (1, 3)),
        ([2, 2], {}, (2,)),
    ],
)
def test_eos_tokens(own: Any, generation: dict[str, Any], expected: tuple[int, ...]) -> None:
    model, _ = read_config(config(eos_token_id=own), generation, "config.json")
    assert model.eos_token_ids == expected


def test_yarn_of_deepseek() -> None:
    model = read(rope_scaling=YARN)
    assert model.rope_scaling is not None
    assert (model.rope_scaling.factor, model.rope_scaling.original_max_position_embeddings) == (40.0, 4096)
    assert model.rope_cos_sin_scale == 1.0
    mscale = 0.1 * math.log(40) + 1
    assert model.softmax_scale == pytest.approx(10**-0.5 * mscale**2)


def test_yarn_in_transformers_5_form() -> None:
    parameters = {**YARN, "rope_type": "yarn", "rope_theta": 50000.0}
    assert read(rope_parameters=parameters, rope_theta=...) == read(rope_scaling=YARN, rope_theta=50000.0)
    plain = {"rope_type": "default", "rope_theta": 5000.0}
    assert read(rope_parameters=plain, rope_theta=...) == read(rope_theta=5000)


def test_kimi_k2_yarn_has_equal_betas() -> None:
    scaling = read(rope_scaling=YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0}).rope_scaling
    assert scaling is not None
    assert scaling.beta_fast == scaling.beta_slow == 1.0


@pytest.mark.parametrize(
    ("changes", "cos_sin", "mscale"),
    [
        ({}, 1.0, 0.1 * math.log(40) + 1),
        ({"mscale": 0.5}, (0.05 * math.log(40) + 1) / (0.1 * math.log(40) + 1), 0.1 * math.log(40) + 1),
        ({"mscale_all_dim": 0}, 0.1 * math.log(40) + 1, 1.0),
        ({"mscale": None, "mscale_all_dim": None}, 0.1 * math.log(40) + 1, 1.0),
        ({"attention_factor": 1.25}, 1.25, 0.1 * math.log(40) + 1),
        ({"factor": 1.0}, 1.0, 1.0),
    ],
)
def test_mscales(changes: dict[str, Any], cos_sin: float, mscale: float) -> None:
    scaling = read(rope_scaling=YARN | changes).rope_scaling
    assert scaling is not None
    assert scaling.cos_sin_scale == pytest.approx(cos_sin)
    assert scaling.softmax_mscale == pytest.approx(mscale)


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: this version runs only silu"),
    ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported: this version runs only sigmoid"),
    ({"topk_method": "greedy"}, "topk_method 'greedy' is not supported: this version runs only noaux_tc"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
    ({"rope_scaling": YARN | {"short_factor": [1]}}, "rope_scaling.short_factor .* not a key of yarn rope"),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "not a key of default rope",
    ),
    ({"sliding_window": 4096}, "sliding_window 4096 is not supported: it changes results"),
    ({"index_topk": 2048}, "index_topk 2048 is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ({"use_qk_norm": True}, "use_qk_norm True is not supported"),
    ({"head_dim": 99}, "head_dim 99 is not supported: it follows from the other sizes as 4"),
    ({"qk_head_dim": 99}, "qk_head_dim 99 is not supported: it follows from the other sizes as 10"),
]


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_refuses_what_it_cannot_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(**changes)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n_group": 4}, "n_group must be a divisor of n_routed_experts 6"),
    ({"n_group": 6, "topk_group": 6}, "n_group must be groups of at least 2 experts"),
    ({"topk_group": 4}, "topk_group must be at most n_group 3"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at most 4"),
    ({"num_key_value_heads": 1}, "num_key_value_heads must be num_attention_heads 2"),
    ({"qk_rope_head_dim": 5}, "qk_rope_head_dim must be an even number"),
    ({"eos_token_id": 50}, "eos_token_ids must be a token below vocab_size 50"),
    ({"eos_token_id": "1"}, "eos_token_id must be an integer, a list of integers or null"),
    ({"bos_token_id": -1}, "bos_token_id must be null or an integer"),
    ({"bos_token_id": 99}, "bos_token_id must be a token below vocab_size 50"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace must be at least 0"),
    ({"moe_layer_freq": 0}, "moe_layer_freq must be at least 1"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers must be an integer in 1..4096"),
    ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
    ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor must be a number"),
    ({"routed_scaling_factor": 10**400}, "routed_scaling_factor must be a finite number"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be a finite number above 0"),
    ({"rope_theta": 1}, "rope_theta must be a finite number above 1"),
    ({"rope_scaling": "yarn"}, "rope_scaling must be an object or null"),
    ({"rope_scaling": {"type": "yarn"}}, "required key rope_scaling.factor is missing"),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling.factor must be a finite number of at least 1"),
    ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "rope_scaling.beta_fast must be at least beta_slow 1"),
    (
        {"rope_scaling": YARN | {"rope_type": "default"}},
        "rope_scaling.rope_type must be the same as type 'yarn'",
    ),
    (
        {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2}},
        "rope_scaling.factor must be 2 as in rope_parameters",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_refuses_what_makes_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read(**changes)


def test_notices() -> None:
    assert notices(num_nextn_predict_layers=1) == [
        "num_nextn_predict_layers 1: multi-token-prediction layers are left out"
    ]
    assert notices(my_key=1, another=None) == ["config.json keys not used: another, my_key"]
    assert notices(sliding_window=None, partial_rotary_factor=1.0, head_dim=4) == []


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "OlmoeForCausalLM", "DeepseekV32ForCausalLM"])
def test_unknown_architecture_lists_the_known(architecture: str) -> None:
    expected = f"architecture {architecture} is not supported; supported: DeepseekV3ForCausalLM"
    with pytest.raises(UnsupportedModelError, match=expected):
        detect(config(architectures=[architecture]))


def test_detection() -> None:
    assert detect(config()).name == "deepseek_v3"
    assert detect(config(model_type="kimi_k2")).name == "deepseek_v3"
    assert detect(config(architectures=...)).name == "deepseek_v3"
    with pytest.raises(UnsupportedModelError, match="architecture model_type 'llama' is not supported"):
        detect(config(architectures=..., model_type="llama"))
    with pytest.raises(InvalidInputError, match="architectures must be a list of strings"):
        detect(config(architectures="DeepseekV3ForCausalLM"))
