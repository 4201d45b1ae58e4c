"""Frequencies and rotations against transformers' own tables."""

import pytest
import torch

from kttools.families import detect
from kttools_runtime.rope import Rope, inverse_frequencies, pair_order, rotate_
from tests.compare import assert_close
from tests.family_oracle import LINEAR, LLAMA3
from tests.family_oracle import hf_model as family_model
from tests.oracle import BASE, CONFIGS, YARN, canonical_config, hf_model


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 50000.0},
        YARN,
        {**YARN, "mscale": 0.707, "mscale_all_dim": 1.3, "factor": 40.0},
        {**YARN, "attention_factor": 1.7},
        {**YARN, "beta_fast": 4.0, "beta_slow": 2.0, "truncate": False},
        {**YARN, "beta_fast": 1.0, "beta_slow": 1.0},
        {**YARN, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "factor": 1.0},
    ],
)
def test_against_transformers(rope: dict[str, object]) -> None:
    hf = hf_model({"rope_parameters": rope, "qk_rope_head_dim": 32})
    config = canonical_config(hf.config)
    theirs = hf.model.rotary_emb
    assert_close(inverse_frequencies(config), theirs.inv_freq, 1e-6)
    cos, sin = theirs(torch.zeros(1), torch.arange(5, 25)[None])
    ours = Rope(config, torch.device("cpu")).rotations(5, 20)[:, 0]
    assert_close(ours.real, cos[0, :, :16], 1e-6)
    assert_close(ours.imag, sin[0, :, :16], 1e-6)
    assert config.softmax_scale == pytest.approx(hf.model.layers[0].self_attn.scaling, rel=1e-12)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("width", [8, 9])
def test_rotates_in_place_whatever_the_strides(offset: int, width: int) -> None:
    """The rotary part may start at an odd element or stride; its neighbours stay as they were."""
    buffer = torch.randn(5 * 3 * width + 1, generator=torch.Generator().manual_seed(0))
    heads = buffer[offset : offset + 5 * 3 * width].view(5, 3, width)
    before = heads.clone()
    angles = torch.rand(5, 1, 3)
    rotate_(heads[..., width - 6 :], torch.polar(torch.ones_like(angles), angles))
    expected = before.clone()
    for pair in range(3):
        a, b = before[..., width - 6 + 2 * pair], before[..., width - 5 + 2 * pair]
        cos, sin = angles[..., pair].cos(), angles[..., pair].sin()
        expected[..., width - 6 + 2 * pair] = a * cos - b * sin
        expected[..., width - 5 + 2 * pair] = a * sin + b * cos
    assert_close(heads, expected, 1e-6)
    assert torch.equal(heads[..., : width - 6], before[..., : width - 6])


def test_pair_order() -> None:
    assert pair_order(canonical_config(hf_model(BASE).config)) is None
    halves = canonical_config(hf_model(CONFIGS["halves_rope"]).config)
    assert pair_order(halves) == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    "rope",
    [
        LINEAR,
        LLAMA3,
        {**LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 2.0, "factor": 32.0},
        {**LLAMA3, "original_max_position_embeddings": 8192},
        {**YARN, "mscale": 0.707, "mscale_all_dim": 1.3},
    ],
)
def test_grouped_query_models_against_transformers(rope: dict[str, object]) -> None:
    hf = family_model("qwen3_moe", "base", rope_parameters=rope, head_dim=32)
    values = hf.config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]}
    config, _ = detect(values).read_config(values, {}, "config.json")
    theirs = hf.model.rotary_emb
    assert_close(inverse_frequencies(config), theirs.inv_freq, 1e-6)
    assert config.rope_cos_sin_scale == pytest.approx(theirs.attention_scaling)
    assert config.softmax_scale == pytest.approx(hf.model.layers[0].self_attn.scaling, rel=1e-12)
