"""ModelConfig: strict both ways, every range checked, derived numbers right."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttools_runtime.config import ModelConfig, YarnScaling
from kttools_runtime.errors import InvalidInputError

YARN: dict[str, Any] = {
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "attention_factor": None,
    "truncate": True,
}
VALUES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "moe_layers": [1, 3],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_ids": [1, 2],
    "attention": "mla",
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "attention_bias": False,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "rope_scaling": YARN,
    "router": "sigmoid_bias_groups",
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def make(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(VALUES | changes)


def test_round_trip_through_json() -> None:
    model = make()
    assert model.to_dict() == VALUES
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    assert make(rope_scaling=None).to_dict()["rope_scaling"] is None


def test_is_frozen_and_hashable() -> None:
    model = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.hidden_size = 1  # type: ignore[misc]
    assert not hasattr(model, "__dict__")
    assert hash(model) == hash(make())


def test_derived_numbers() -> None:
    model = make()
    mscale = 0.1 * math.log(40) + 1
    assert model.qk_head_dim == 16
    assert model.softmax_scale == pytest.approx(0.25 * mscale * mscale)
    assert model.rope_cos_sin_scale == 1.0
    assert [model.is_moe(layer) for layer in range(4)] == [False, True, False, True]
    assert make(n_shared_experts=3).shared_intermediate_size == 48
    assert make(rope_scaling=None).softmax_scale == 0.25


def test_integers_are_taken_for_floats() -> None:
    model = make(rope_theta=10000, routed_scaling_factor=1, rope_scaling=YARN | {"factor": 40})
    assert type(model.rope_theta) is type(model.routed_scaling_factor) is float
    assert model.rope_scaling is not None
    assert type(model.rope_scaling.factor) is float


@pytest.mark.parametrize("key", VALUES)
def test_every_key_is_required(key: str) -> None:
    with pytest.raises(InvalidInputError, match=f"missing key '{key}'"):
        ModelConfig.from_dict({name: value for name, value in VALUES.items() if name != key})


@pytest.mark.parametrize("key", YARN)
def test_every_yarn_key_is_required(key: str) -> None:
    yarn = {name: value for name, value in YARN.items() if name != key}
    with pytest.raises(InvalidInputError, match=f"missing key 'rope_scaling.{key}'"):
        make(rope_scaling=yarn)


def test_unknown_keys() -> None:
    with pytest.raises(InvalidInputError, match="unknown key 'extra'"):
        make(extra=1)
    with pytest.raises(InvalidInputError, match=r"unknown key 'rope_scaling\.extra'"):
        make(rope_scaling=YARN | {"extra": 1})


@pytest.mark.parametrize("value", [None, [], "x", 1])
def test_not_an_object(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="must be an object"):
        ModelConfig.from_dict(value)


WRONG_VALUES = ("text", {"a": 1}, -7, [-1], float("nan"), float("inf"), 2**80, [[1]])
# Odd, but within the rules: a finite number is all these ask for.
LEGAL = [
    ("routed_scaling_factor", -7),
    *((k, 2**80) for k in ("routed_scaling_factor", "rope_theta", "rms_norm_eps")),
]
PAIRS = [(key, value) for key in VALUES for value in WRONG_VALUES if (key, value) not in LEGAL]


@pytest.mark.parametrize(("key", "value"), PAIRS, ids=str)
def test_wrong_types_and_ranges_name_the_key(key: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"{key}|rope_scaling"):
        make(**{key: value})


@pytest.mark.parametrize("key", [key for key, value in VALUES.items() if type(value) is int])
def test_booleans_are_no_integers(key: str) -> None:
    with pytest.raises(InvalidInputError, match=key):
        make(**{key: True})


RULES: list[tuple[dict[str, Any], str]] = [
    ({"moe_layers": [3, 1]}, "moe_layers must be an ascending list"),
    ({"moe_layers": [1, 1]}, "moe_layers must be an ascending list"),
    ({"moe_layers": [4]}, "moe_layers must be layers below num_hidden_layers 4, got 4"),
    ({"eos_token_ids": [1, 1]}, "eos_token_ids must be a list of distinct token ids"),
    ({"eos_token_ids": [100]}, "eos_token_ids must be a token below vocab_size 100, got 100"),
    ({"bos_token_id": 100}, "bos_token_id must be a token below vocab_size 100, got 100"),
    (
        {"num_key_value_heads": 1},
        "num_key_value_heads must be num_attention_heads 3 with attention mla, got 1",
    ),
    ({"qk_rope_head_dim": 3}, "qk_rope_head_dim must be an even number, got 3"),
    ({"n_group": 5}, "n_group must be a divisor of n_routed_experts 12, got 5"),
    ({"n_group": 12, "topk_group": 12}, "n_group must be groups of at least 2 experts .*, got 12"),
    ({"topk_group": 5}, "topk_group must be at most n_group 4, got 5"),
    (
        {"num_experts_per_tok": 7},
        "num_experts_per_tok must be at most 6, the experts of topk_group groups, got 7",
    ),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok must be an integer in 1"),
    ({"hidden_act": "gelu"}, "hidden_act must be one of silu, got 'gelu'"),
    ({"attention": "mha"}, "attention must be one of mla, gqa, got 'mha'"),
    ({"router": "softmax"}, "router must be one of sigmoid_bias_groups, softmax_groups, got 'softmax'"),
    ({"rope_scaling": YARN | {"beta_slow": 64.0}}, "beta_fast must be at least beta_slow 64, got 32.0"),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "factor must be a finite number of at least 1, got 0.5"),
    ({"rope_scaling": YARN | {"truncate": 1}}, "truncate must be true or false, got 1"),
]


@pytest.mark.parametrize(("changes", "message"), RULES, ids=lambda value: str(value)[:40])
def test_rules(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make(**changes)


@given(factor=st.floats(1, 1e3), mscale=st.floats(0.1, 4), all_dim=st.floats(0.1, 4))
def test_mscales_against_their_definition(factor: float, mscale: float, all_dim: float) -> None:
    """DeepSeek's yarn_get_mscale: 1 + 0.1 m ln(s); the ratio goes to cos and sin, the square to softmax."""
    scaling = YarnScaling(**YARN | {"factor": factor, "mscale": mscale, "mscale_all_dim": all_dim})
    above, below = (1 + 0.1 * m * math.log(factor) for m in (mscale, all_dim))
    assert scaling.cos_sin_scale == pytest.approx(above / below)
    assert scaling.softmax_mscale == pytest.approx(below)


GQA: dict[str, Any] = VALUES | {
    "attention": "gqa",
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "kv_lora_rank": 0,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "router": "softmax_groups",
}
DEFAULTED: dict[str, Any] = {
    "attention_output_bias": True,
    "qk_norm": True,
    "sliding_window": 5,
    "sliding_window_layers": [0, 2],
    "shared_expert_intermediate_size": 20,
    "shared_expert_gate": True,
}


GPT_OSS: dict[str, Any] = {
    "attention_sinks": True,
    "router_bias": True,
    "expert_bias": True,
    "swiglu_alpha": 1.5,
    "swiglu_limit": 7.0,
}


def gqa(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(GQA | changes)


def test_keys_with_a_default_are_left_out() -> None:
    """So a config of the first bundles has the same dict, and the same fingerprint, as ever."""
    assert gqa().to_dict() == GQA
    assert gqa(**DEFAULTED).to_dict() == GQA | DEFAULTED
    assert make(latent_norm_eps=1e-5).to_dict() == VALUES | {"latent_norm_eps": 1e-5}
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    assert names == set(VALUES) | set(DEFAULTED) | set(GPT_OSS) | {"latent_norm_eps"}


def test_keys_of_gpt_oss_are_kept_and_left_out() -> None:
    plain = gqa(moe_layers=[0, 1, 2, 3], n_shared_experts=0)
    model = gqa(moe_layers=[0, 1, 2, 3], n_shared_experts=0, **GPT_OSS)
    assert model.to_dict() == plain.to_dict() | GPT_OSS
    with pytest.raises(InvalidInputError, match="swiglu_alpha must be given together with swiglu_limit"):
        gqa(moe_layers=[0, 1, 2, 3], n_shared_experts=0, swiglu_alpha=1.5)
    with pytest.raises(InvalidInputError, match="swiglu_limit must be absent with dense layers"):
        gqa(**GPT_OSS)


@pytest.mark.parametrize("key", [*DEFAULTED, *GPT_OSS, "latent_norm_eps"])
def test_a_stated_default_is_refused(key: str) -> None:
    default = {f.name: f.default for f in dataclasses.fields(ModelConfig)}[key]
    stated = list(default) if isinstance(default, tuple) else default
    with pytest.raises(InvalidInputError, match=f"key '{key}' states its default, leave it out"):
        gqa(**{key: stated})


def test_derived_numbers_of_gqa() -> None:
    model = gqa(**DEFAULTED)
    assert (model.qk_head_dim, model.cache_width) == (8, 2 * 2 * 8)
    assert model.softmax_scale == pytest.approx(8**-0.5)  # mscale_all_dim is for mla alone
    assert [model.window(layer) for layer in range(4)] == [5, None, 5, None]
    assert model.shared_intermediate_size == 20
    assert gqa().window(0) is None
    assert make().cache_width == 12


GQA_RULES: list[tuple[dict[str, Any], str]] = [
    ({"num_key_value_heads": 4}, "num_key_value_heads must be a divisor of num_attention_heads 6, got 4"),
    ({"kv_lora_rank": 3}, "kv_lora_rank must be 0 with attention gqa, got 3"),
    ({"q_lora_rank": 3}, "q_lora_rank must be null with attention gqa, got 3"),
    ({"latent_norm_eps": 1e-5}, "latent_norm_eps must be null with attention gqa"),
    ({"v_head_dim": 6}, "v_head_dim must be qk_head_dim 8 with attention gqa, got 6"),
    ({"qk_rope_head_dim": 3, "v_head_dim": 7}, "qk_rope_head_dim must be an even number, got 3"),
    ({"sliding_window": 4}, "sliding_window must be given together with sliding_window_layers, got 4"),
    ({"sliding_window_layers": [1]}, "sliding_window must be given together with sliding_window_layers"),
    (
        {"sliding_window": 4, "sliding_window_layers": [4]},
        "sliding_window_layers must be layers below num_hidden_layers 4, got 4",
    ),
    ({"sliding_window": 0, "sliding_window_layers": [1]}, "sliding_window must be null or an integer in 1"),
    ({"n_shared_experts": 0, "shared_expert_gate": True}, "shared_expert_gate must be absent without shared"),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type must be absent .yarn. or one of linear, llama3"),
    ({"rope_scaling": {"rope_type": "yarn"} | YARN}, "rope_type must be absent"),
    ({"rope_scaling": {"rope_type": "linear"}}, "missing key 'rope_scaling.factor'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor must be a finite number of at least"),
    (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        "high_freq_factor must be above low_freq_factor 4, got 4.0",
    ),
]


@pytest.mark.parametrize(("changes", "message"), GQA_RULES, ids=lambda value: str(value)[:40])
def test_rules_of_gqa(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        gqa(**changes)


@pytest.mark.parametrize("key", [key for key in DEFAULTED if "shared" not in key])
def test_keys_of_gqa_are_refused_with_mla(key: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{key} must be absent with attention mla"):
        make(**{key: DEFAULTED[key]})


@pytest.mark.parametrize("key", ["kv_lora_rank", "qk_nope_head_dim"])
def test_sizes_of_mla_are_not_0(key: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{key} must be an integer in 1.* with attention mla, got 0"):
        make(**{key: 0})


def test_a_group_of_one_expert_has_a_best_but_no_best_two() -> None:
    assert gqa(n_group=12, topk_group=6).n_group == 12
    with pytest.raises(InvalidInputError, match="groups of at least 2 experts"):
        gqa(n_group=12, topk_group=6, router="sigmoid_bias_groups")


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
def test_other_rope_scalings_round_trip(scaling: dict[str, Any]) -> None:
    model = gqa(rope_scaling=scaling)
    assert model.to_dict()["rope_scaling"] == scaling
    assert model.rope_cos_sin_scale == 1.0
