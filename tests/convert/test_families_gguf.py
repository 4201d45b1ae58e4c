"""Every family there and back: transformers' random model -> GGUF -> the same config and the same numbers."""

from pathlib import Path

import pytest

from kttools.eval.diff import compare
from kttools.families import open_model
from kttools.gguf_out.plan import make_plan
from kttools.gguf_out.writer import write
from kttools_runtime.errors import UnsupportedModelError
from tests.family_oracle import hf_model, save

NO_TOKENIZER = "a bundle made of it can compute but not read or write text"
SAYABLE = [
    ("deepseek_v2", "lite"),
    ("deepseek_v2", "yarn"),
    ("deepseek_v2", "groups"),
    ("qwen3_moe", "base"),
    ("qwen3_moe", "yarn"),
    ("qwen2_moe", "base"),
    ("mixtral", "base"),
    ("mixtral", "head_dim"),
    ("glm4_moe", "air"),
    ("glm4_moe", "qk_norm"),
    ("glm4_moe", "groups"),
    ("gpt_oss", "base"),
    ("gpt_oss", "default_rope"),
]


@pytest.mark.parametrize(("family", "case"), SAYABLE)
def test_there_and_back(tmp_path: Path, family: str, case: str) -> None:
    source = open_model(save(hf_model(family, case), tmp_path / "hf"))
    write(make_plan(source, tmp_path / "x.gguf", "bf16"))
    again = open_model(tmp_path / "x.gguf")
    assert again.family == source.family
    assert again.config == source.config
    assert again.notices == [f"{tmp_path / 'x.gguf'}: no tokenizer.json; " + NO_TOKENIZER]
    result = compare(source, again)
    assert result.missing == []
    assert result.worst_relative_rms == 0.0


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("qwen3_moe", "window"),
        ("qwen3_moe", "not_normalised"),
        ("qwen3_moe", "dense_layers"),
        ("qwen2_moe", "llama3"),
        ("mixtral", "window"),
        ("gpt_oss", "all_windows"),
        ("gpt_oss", "gate"),
    ],
)
def test_what_gguf_cannot_say_is_refused(tmp_path: Path, family: str, case: str) -> None:
    source = open_model(save(hf_model(family, case), tmp_path / "hf"))
    with pytest.raises(UnsupportedModelError):
        make_plan(source, tmp_path / "x.gguf", "bf16")
