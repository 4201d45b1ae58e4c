"""GGUF we write: read back by the gguf package and by ourselves; round trips; splits; what is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from kttools.bundle.source import open_bundle
from kttools.cli import main
from kttools.families import open_model
from kttools.gguf_out import writer
from kttools.gguf_out.plan import make_plan
from kttools.gguf_out.writer import check_target, write
from kttools.quantize.plan import make_plan as quantize_plan
from kttools.quantize.recipe import Recipe
from kttools.quantize.writer import Quantizer
from kttools_runtime.errors import InvalidInputError, UnsupportedModelError, UsageError
from tests.forge import config, hub_tensors, save_model

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def bundle(source: Path, target: Path, cpu: str = "int8", gpu: str = "int4") -> Path:
    Quantizer(quantize_plan(open_model(source), Recipe(cpu, gpu, 128)), target).run()
    return target


def written(source: Path, target: Path, type_name: str = "bf16", split: int | None = None) -> Path:
    plan = make_plan(open_model(source), target, type_name, split)
    write(plan)
    return plan.files[0].path


@pytest.fixture(scope="session")
def nano_gguf(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model as one BF16 file. Read-only."""
    return written(nano_checkpoint, tmp_path_factory.mktemp("gguf") / "nano.gguf")


def test_round_trip_gives_the_same_packs_and_text(
    tmp_path: Path, nano_checkpoint: Path, nano_gguf: Path
) -> None:
    """safetensors -> GGUF -> bundle equals safetensors -> bundle."""
    import kttools_runtime as kt

    direct = bundle(nano_checkpoint, tmp_path / "direct")
    around = bundle(nano_gguf, tmp_path / "around")
    packs = sorted((direct / "experts").iterdir())
    assert len(packs) == 3
    for pack in packs:
        assert pack.read_bytes() == (around / "experts" / pack.name).read_bytes()
    answers = []
    for path in (direct, around):
        model = kt.load(path, threads=1)
        prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": "What is a KV cache?"}])
        answers.append(model.tokenizer.decode(list(model.generate(prompt, max_new_tokens=24))))
        assert model.tokenizer.generation_config["temperature"] == 0.7
    assert answers[0] == answers[1]
    assert len(answers[0]) > 40


def test_the_gguf_package_reads_what_we_wrote(nano_checkpoint: Path, nano_gguf: Path) -> None:
    """An independent reader: values, shapes and metadata, with kv_b_proj split head by head."""
    reader = gguf.GGUFReader(nano_gguf)
    found = {tensor.name: tensor for tensor in reader.tensors}
    source = {tensor.name: tensor for tensor in open_model(nano_checkpoint).tensors}
    assert len(found) == 70
    for name, hub in {
        "output.weight": "lm_head.weight",
        "blk.2.attn_q_a.weight": "model.layers.2.self_attn.q_a_proj.weight",
    }.items():
        values = source[hub].read()
        assert tuple(reversed(found[name].shape.tolist())) == tuple(values.shape)
        assert found[name].data.tobytes() == values.view(torch.uint8).numpy().tobytes()
    norm = source["model.layers.1.input_layernorm.weight"].read().float().numpy()
    assert np.array_equal(found["blk.1.attn_norm.weight"].data, norm)
    joint = source["model.layers.0.self_attn.kv_b_proj.weight"].read().view(4, 128, 64)
    key = torch.from_numpy(found["blk.0.attn_k_b.weight"].data.copy()).view(torch.bfloat16).view(4, 64, 64)
    assert torch.equal(key[3, 10, 7], joint[3, 7, 10])
    assert torch.equal(key, joint[:, :64].transpose(1, 2))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["deepseek2.attention.key_length_mla"] == 96
    assert fields["deepseek2.expert_group_used_count"] == 2
    assert fields["general.file_type"] == 32
    assert fields["tokenizer.ggml.pre"] == "deepseek-v3"
    assert len(fields["tokenizer.ggml.tokens"]) == 8192
    assert fields["tokenizer.ggml.token_type"][:6] == [3, 3, 3, 3, 3, 1]


def test_config_and_tokenizer_come_back(nano_checkpoint: Path, nano_gguf: Path) -> None:
    original, again = open_model(nano_checkpoint), open_model(nano_gguf)
    assert again.config == original.config
    first = json.loads((nano_checkpoint / "tokenizer.json").read_bytes())
    second = json.loads(again.tokenizer_data["tokenizer.json"])
    assert second["model"]["vocab"] == first["model"]["vocab"]
    assert [list(m) for m in second["model"]["merges"]] == [
        m.split(" ") if isinstance(m, str) else m for m in first["model"]["merges"]
    ]
    assert second["pre_tokenizer"] == first["pre_tokenizer"]
    assert second["post_processor"]["processors"][1] == first["post_processor"]["processors"][1]
    assert second["added_tokens"] == first["added_tokens"]


# Relative RMS of a normal weight in blocks of 32: a step of d is an error of d / sqrt(12), and the largest
# of 32 normal values is 2.07 on average, so d is 2.07 / 127 (q8_0), / 8 (q4_0), / 16 (q5_0); a quarter more
# for the spread of the largest. f16 and bf16 keep 11 and 8 bits.
BOUNDS = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.006, "q5_0": 0.047, "q4_0": 0.094}


@pytest.mark.parametrize("type_name", BOUNDS)
def test_every_type(tmp_path: Path, type_name: str) -> None:
    values = config(hidden_size=64, moe_intermediate_size=32, intermediate_size=32, q_lora_rank=32)
    source = open_model(save_model(tmp_path / "hf", values, hub_tensors(values)))
    again = open_model(written(source.path, tmp_path / "x.gguf", type_name))
    for a, b in zip(source.tensors, again.tensors, strict=True):
        error = (a.read().float() - b.read().float()).norm() / a.read().float().norm()
        is_exact = "norm" in a.name or "mlp.gate." in a.name
        assert not error > (0.0 if is_exact else BOUNDS[type_name]), a.name
    for a, b in zip(source.read_expert(2, 5), again.read_expert(2, 5), strict=True):
        error = float((a.float() - b.float()).norm() / a.float().norm())
        assert error <= BOUNDS[type_name]
        assert type_name in ("f32", "bf16", "f16") or error > BOUNDS[type_name] / 4
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert type_name.upper() in kinds
    if type_name == "q4_0":
        assert {"Q8_0", "BF16", "F32"} <= kinds  # head and embedding, kv_b, norms


def test_splits(tmp_path: Path, nano_checkpoint: Path, nano_gguf: Path) -> None:
    first = written(nano_checkpoint, tmp_path / "n.gguf", "bf16", 4_000_000)
    files = sorted(tmp_path.iterdir())
    numbers = range(1, len(files) + 1)
    assert [file.name for file in files] == [f"n-{i:05d}-of-{len(files):05d}.gguf" for i in numbers]
    assert first == files[0]
    assert len(files) > 4
    whole, parts = open_model(nano_gguf), open_model(tmp_path)
    assert parts.config == whole.config
    for a, b in zip(whole.tensors, parts.tensors, strict=True):
        assert torch.equal(a.read(), b.read())
    assert all(
        torch.equal(a, b) for a, b in zip(whole.read_expert(3, 31), parts.read_expert(3, 31), strict=True)
    )
    fields = gguf.GGUFReader(files[2]).fields
    assert fields["split.no"].contents() == 2
    assert fields["split.tensors.count"].contents() == 70


def test_from_a_bundle(tmp_path: Path, nano_checkpoint: Path) -> None:
    """A bf16 bundle gives the same file as its checkpoint; a quantised one its own numbers."""
    exact = bundle(nano_checkpoint, tmp_path / "exact", "bf16", "bf16")
    plan = make_plan(open_bundle(exact), tmp_path / "same.gguf", "bf16")
    write(plan)
    (tmp_path / "direct").mkdir()
    expected = written(nano_checkpoint, tmp_path / "direct" / "same.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == expected.read_bytes()
    rounded = open_bundle(bundle(nano_checkpoint, tmp_path / "int", "int8", "int4"))
    write(make_plan(rounded, tmp_path / "int.gguf", "f32"))
    again = open_model(tmp_path / "int.gguf")
    for a, b in zip(rounded.tensors, again.tensors, strict=True):
        assert torch.equal(a.read().float(), b.read().float()), a.name
    for a, b in zip(rounded.read_expert(2, 9), again.read_expert(2, 9), strict=True):
        assert torch.equal(a, b)


def test_yarn_is_written_and_read(tmp_path: Path) -> None:
    values = config(rope_scaling=YARN)
    source = open_model(save_model(tmp_path / "hf", values, hub_tensors(values)))
    again = open_model(written(source.path, tmp_path / "x.gguf"))
    assert again.config == source.config


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": YARN | {"mscale": 0.5}}, "GGUF holds one mscale"),
    ({"attention_bias": True}, "deepseek2, the nearest, needs no biases of attention"),
    ({"moe_layer_freq": 2, "num_hidden_layers": 4}, "dense layers follow MoE layers"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_gguf_cannot_say(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = config(**changes)
    tensors = hub_tensors(values)
    if "attention_bias" in changes:
        for layer in range(3):
            prefix = f"model.layers.{layer}.self_attn."
            for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
                rows = tensors[f"{prefix}{name}.weight"].shape[0]
                tensors[f"{prefix}{name}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    if "moe_layer_freq" in changes:
        tensors = _every_second(values, tensors)
    source = open_model(save_model(tmp_path / "hf", values, tensors))
    with pytest.raises(UnsupportedModelError, match=message):
        make_plan(source, tmp_path / "x.gguf", "bf16")


def _every_second(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """hub_tensors() knows no moe_layer_freq: layers 1 and 3 become dense."""
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not any(name.startswith(f"model.layers.{layer}.mlp.") for layer in (1, 3))
    }
    hidden, inner = values["hidden_size"], values["intermediate_size"]
    for layer in (1, 3):
        shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        for name, shape in shapes.items():
            kept[f"model.layers.{layer}.mlp.{name}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)
    return kept


def test_no_file_without_its_whole_content(
    tmp_path: Path, nano_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error on the way leaves neither the file nor a part of it, and an older file as it was."""
    (tmp_path / "x.gguf").write_bytes(b"older")
    plan = make_plan(open_model(nano_checkpoint), tmp_path / "x.gguf", "bf16")
    with pytest.raises(UsageError, match="already exists"):
        check_target(plan, is_forced=False)
    check_target(plan, is_forced=True)
    calls = iter(range(100))

    def fail(*arguments: Any) -> Any:
        if next(calls) == 30:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    original = writer._write_all
    monkeypatch.setattr(writer, "_write_all", fail)
    with pytest.raises(Exception, match="disk is full"):
        write(plan)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == b"older"


def test_a_weight_that_is_no_number(tmp_path: Path) -> None:
    values = config()
    tensors = hub_tensors(values)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4] = float("nan")
    source = open_model(save_model(tmp_path / "hf", values, tensors))
    with pytest.raises(
        InvalidInputError, match=r"expert 2 of layer 1, blk.1.ffn_up_exps.weight: the weight nan"
    ):
        write(make_plan(source, tmp_path / "x.gguf", "bf16"))
    tensors = hub_tensors(values)
    tensors["lm_head.weight"][3, 4] = 1e6
    save_model(tmp_path / "hf", values, tensors)
    with pytest.raises(InvalidInputError, match=r"lm_head.weight: the weight .* cannot be written as F16"):
        write(make_plan(open_model(tmp_path / "hf"), tmp_path / "x.gguf", "f16"))
    assert not (tmp_path / "x.gguf").exists()


def test_command(tmp_path: Path, nano_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "x.gguf"
    arguments = ["convert", str(nano_checkpoint), "-o", str(target), "--type", "q8_0", "--json", "--quiet"]
    assert main([*arguments, "--dry-run"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert not target.exists()
    assert main(arguments) == 0
    assert document["files"] == [{"path": str(target), "bytes": target.stat().st_size}]
    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*arguments[:3], str(tmp_path / "x.bin")]) == 2
    assert main([*arguments, "--force", "--split-max-size", "huge"]) == 2


def test_chat_straight_from_a_gguf_file(
    tmp_path: Path, nano_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command: quantised into the cache, tokenizer and template from the file, a known answer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = [
        "chat",
        "-m",
        str(nano_gguf),
        "-p",
        "Who are you?",
        "--temp",
        "0",
        "-n",
        "16",
        "-t",
        "1",
        "--quiet",
    ]
    assert main(line) == 0
    assert "I am ds3-nano" in capsys.readouterr().out
    assert len(list((tmp_path / "kttools" / "bundles").glob("nano-*/bundle.json"))) == 1


def test_weights_for_another_directorys_config(
    tmp_path: Path, nano_checkpoint: Path, nano_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """KTransformers' way: config and tokenizer from --model_path, the weights from --gguf_path."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in nano_checkpoint.glob("*.json"):
        if "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    line = ["quantize", "--model_path", str(folder), "--gguf_path", str(nano_gguf)]
    assert main([*line, "-o", str(tmp_path / "pair"), "--quiet"]) == 0
    direct = bundle(nano_gguf, tmp_path / "direct")
    for pack in sorted((direct / "experts").iterdir()):
        assert pack.read_bytes() == (tmp_path / "pair" / "experts" / pack.name).read_bytes()
    tokenizer = (tmp_path / "pair" / "tokenizer" / "tokenizer.json").read_bytes()
    assert tokenizer == (nano_checkpoint / "tokenizer.json").read_bytes()
    assert main(["convert", str(folder), "--gguf_path", str(nano_gguf), "-o", str(tmp_path / "y.gguf")]) == 2
    assert "is for quantize and chat" in capsys.readouterr().err
