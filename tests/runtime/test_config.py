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
    ({"attention": "gqa"}, "attention must be one of mla, got 'gqa'"),
    ({"router": "softmax"}, "router must be one of sigmoid_bias_groups, got 'softmax'"),
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
