"""Every family there and back: transformers' random model -> GGUF -> the same config and the same numbers."""

from pathlib import Path

import pytest
from gguf import GGUFReader

from kttools.checkpoint.gguf.splits import open_files
from kttools.checkpoint.gguf.views import read_rows
from kttools.eval.diff import compare
from kttools.families import open_model
from kttools.gguf_out.plan import make_plan
from kttools.gguf_out.writer import write
from kttools_runtime.errors import UnsupportedModelError
from tests.checkpoint.gguf_forge import Image, f32
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


def test_mixtral_with_a_tensor_per_expert(tmp_path: Path) -> None:
    """As converted in early 2024, before experts were stacked: blk.N.ffn_gate.E.weight."""
    source = open_model(save(hf_model("mixtral", "base"), tmp_path / "hf"))
    write(make_plan(source, tmp_path / "new.gguf", "f32"))
    new = open_files(tmp_path / "new.gguf")
    tensors = []
    for tensor in new.tensors.values():
        values = read_rows(tensor, 0, tensor.shape[0]).float().numpy()
        if "_exps." in tensor.name:
            name = tensor.name.replace("_exps.weight", ".{}.weight")
            tensors += [f32(name.format(expert), each) for expert, each in enumerate(values)]
        else:
            tensors.append(f32(tensor.name, values))
    assert sum(".ffn_gate.7.weight" in tensor.name for tensor in tensors) == 3
    reader = GGUFReader(tmp_path / "new.gguf")
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    pairs = [(name, int(field.types[0]), field.contents()) for name, field in fields.items()]
    Image(pairs, tensors).save(tmp_path / "old.gguf")
    old = open_model(tmp_path / "old.gguf")
    assert old.expert_layout(1) == "one tensor per expert"
    assert old.config == source.config
    result = compare(source, old)
    assert result.missing == []
    assert result.worst_relative_rms == 0.0


@pytest.mark.parametrize(
    ("family", "case", "message"),
    [
        ("qwen3_moe", "window", "qwen3moe, the nearest, needs no sliding window"),
        ("qwen3_moe", "not_normalised", "qwen3moe, the nearest, needs norm_topk_prob true"),
        ("qwen3_moe", "bias", "qwen3moe, the nearest, needs no bias of o_proj and no biases of attention"),
        ("qwen3_moe", "dense_layers", "dense layers"),
        ("qwen2_moe", "normalised", "qwen2moe, the nearest, needs norm_topk_prob false"),
        ("qwen2_moe", "llama3", "only linear and plain yarn"),
        ("mixtral", "window", "llama, the nearest, needs no sliding window"),
        ("gpt_oss", "all_windows", "window in the first of every two layers"),
        ("gpt_oss", "gate", r"gpt-oss, the nearest, needs swiglu_alpha 1\.702 and swiglu_limit 7"),
    ],
)
def test_what_gguf_cannot_say_is_refused(tmp_path: Path, family: str, case: str, message: str) -> None:
    source = open_model(save(hf_model(family, case), tmp_path / "hf"))
    with pytest.raises(UnsupportedModelError, match=message):
        make_plan(source, tmp_path / "x.gguf", "bf16")
