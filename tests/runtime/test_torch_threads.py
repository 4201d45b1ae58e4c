"""When torch gets its thread team: the estimate's ends, and that the setting is made."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kttools_runtime as kt
from kttools_runtime.config import ModelConfig
from kttools_runtime.torch_threads import set_threads_for_logits, set_torch_threads
from tests.oracle import BASE, canonical_config, hf_model

DEEPSEEK_V3 = {
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


@pytest.fixture
def small() -> ModelConfig:
    return canonical_config(hf_model(BASE).config)


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("is_large", "start", "num_tokens", "expected"),
    [
        (False, 0, 1, 1),
        (False, 4000, 1, 1),
        (False, 0, 512, 1),
        (False, 100_000, 1024, 2),
        (True, 0, 1, 2),
        (True, 0, 512, 2),
        (True, 0, 2, 2),
    ],
)
def test_team_only_where_attention_is_long(
    small: ModelConfig, is_large: bool, start: int, num_tokens: int, expected: int
) -> None:
    config = dataclasses.replace(small, **DEEPSEEK_V3) if is_large else small
    torch.set_num_threads(2)
    set_torch_threads(config, torch.bfloat16, 2, start, num_tokens)
    assert torch.get_num_threads() == expected


def test_one_thread_stays_one(small: ModelConfig) -> None:
    set_torch_threads(small, torch.float32, 1, 100_000, 4096)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (512, 2)])
def test_many_logits_get_the_team(rows: int, expected: int) -> None:
    torch.set_num_threads(1)
    set_threads_for_logits(2, rows, 129280)
    assert torch.get_num_threads() == expected


def test_native_attention_leaves_torch_one_thread(nano_bundle: Path) -> None:
    model = kt.load(nano_bundle, threads=2)
    layer = model.layers[0]
    assert layer.native is not None
    assert layer.native.attends(1)
    assert layer.torch_threads(2, 1) == 1
    layer.native = None
    assert layer.torch_threads(2, 1) == 2
