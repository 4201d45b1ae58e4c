"""What quantize writes: held against the checkpoint by plain arithmetic, the plan, and the readers."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kttools.bundle.verify import verify_bundle
from kttools.families import canonical_tensors
from kttools.quantize import writer
from kttools_runtime import _kernels
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.manifest import load_manifest
from kttools_runtime.pack import map_pack, verify_pack
from kttools_runtime.shards import ShardWeights
from tests.forge import config, hub_tensors, save, save_model, stack_experts
from tests.quantize.conftest import SIZES, contents, plan_for, quantize

FORMATS = [("int8", "int4"), ("bf16", "bf16"), ("int4_g64", "int8")]


def stored_tensors(bundle: Path) -> dict[str, torch.Tensor]:
    """Every quantised matrix of a bundle, dequantised through the readers, under its tensor name."""
    manifest = load_manifest(bundle)
    files = [manifest.path(name) for name in manifest.files if name.endswith(".safetensors")]
    shards = ShardWeights(files, manifest.linears)
    found = {}
    for spec in canonical_tensors(manifest.model):
        base = spec.name.removesuffix(".weight")
        found[spec.name] = (
            shards.linear(base, *spec.shape).dequantized()
            if base in manifest.linears
            else shards.tensor(spec.name, spec.shape)
        )
    for layer in manifest.experts:
        header, blobs = map_pack(manifest.expert_path(layer))
        for expert, (name, blob) in enumerate(zip(header.formats, blobs, strict=True)):
            sizes = header.hidden_size, header.moe_intermediate_size
            parts = _kernels.unpack_expert(name, blob, *sizes)
            for projection, values in zip(("gate_proj", "up_proj", "down_proj"), parts, strict=True):
                tensor = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                found[tensor] = torch.from_numpy(values)
    return found


@pytest.mark.parametrize(("cpu", "gpu"), FORMATS)
def test_bundle_holds_the_checkpoint(checkpoint: Path, tmp_path: Path, cpu: str, gpu: str) -> None:
    """Everything is there, close to the source by the bound of its format, and exactly where it is bf16."""
    quantize(checkpoint, tmp_path / "b", cpu=cpu, gpu=gpu)
    assert verify_bundle(tmp_path / "b").problems == []
    manifest = load_manifest(tmp_path / "b")
    stored = stored_tensors(tmp_path / "b")
    source = hub_tensors(config(**SIZES))
    assert stored.keys() == source.keys()
    bounds = {"bf16": 0.0, "int8": 0.02, "int4": 0.15, "int4_g64": 0.15, None: 0.0}
    for name, tensor in source.items():
        is_expert = ".experts." in name
        form = cpu if is_expert else manifest.linears.get(name.removesuffix(".weight"))
        wanted, got = tensor.double(), stored[name].double()
        relative = float((wanted - got).norm() / wanted.norm())
        assert not (relative > bounds[form]), f"{name} {form}: {relative}"
        if form not in ("bf16", None):
            assert relative > 0, f"{name} is {form} and has no error: was it quantised?"
        if form is None:
            assert stored[name].dtype == tensor.dtype


@pytest.mark.parametrize(("cpu", "gpu"), FORMATS)
def test_the_report_is_what_numpy_says(checkpoint: Path, tmp_path: Path, cpu: str, gpu: str) -> None:
    """Every linear and every expert matrix is in it, with the numbers of an independent computation."""
    outcome = quantize(checkpoint, tmp_path / "b", cpu=cpu, gpu=gpu)
    document = json.loads((tmp_path / "b" / "quantization-report.json").read_bytes())
    source, stored = hub_tensors(config(**SIZES)), stored_tensors(tmp_path / "b")
    linears = {f"{base}.weight" for base in load_manifest(tmp_path / "b").linears}
    experts = {name for name in source if ".experts." in name}
    assert {entry["name"] for entry in document["tensors"]} == linears | experts
    assert len(document["tensors"]) == len(linears | experts) == len(outcome.errors)
    for entry in document["tensors"]:
        a = source[entry["name"]].double().numpy().ravel()
        b = stored[entry["name"]].double().numpy().ravel()
        assert entry["shape"] == list(source[entry["name"]].shape)
        assert entry["relative_rms"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-5)
        assert entry["max_abs_error"] == pytest.approx(np.abs(a - b).max(), rel=1e-5, abs=1e-12)
        assert entry["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)


@pytest.mark.parametrize(("cpu", "gpu"), FORMATS)
def test_the_plan_is_what_was_written(checkpoint: Path, tmp_path: Path, cpu: str, gpu: str) -> None:
    plan = plan_for(checkpoint, cpu, gpu)
    quantize(checkpoint, tmp_path / "b", cpu=cpu, gpu=gpu)
    sizes = {path: len(data) for path, data in contents(tmp_path / "b").items()}
    for pack in plan.packs:
        assert sizes[pack.path] == pack.bytes
    for shard in plan.shards:
        assert sizes[f"shards/{shard.name}"] == shard.bytes
    by_folder = {
        folder: sum(size for path, size in sizes.items() if path.startswith(f"{folder}/"))
        for folder in ("experts", "shards", "tokenizer")
    }
    assert by_folder == {
        "experts": plan.expert_bytes,
        "shards": plan.shard_bytes,
        "tokenizer": plan.tokenizer_bytes,
    }
    assert plan.write_bytes == sum(by_folder.values())
    rest = sizes["bundle.json"] + sizes["quantization-report.json"]
    assert rest <= plan.report_bytes_estimate
    assert plan.source.source_bytes == sum(
        t.numel() * t.element_size() for t in hub_tensors(config(**SIZES)).values()
    )


def test_the_manifest_says_where_it_comes_from(checkpoint: Path, tmp_path: Path) -> None:
    quantize(checkpoint, tmp_path / "b")
    manifest = load_manifest(tmp_path / "b")
    assert manifest.source["config"] == config(**SIZES)
    listed = {entry["path"]: entry for entry in manifest.source["files"]}
    assert set(listed) == {"config.json", "model.safetensors"}
    for name, entry in listed.items():
        data = (checkpoint / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest.recipe["group_size"] == 32
    copied = (tmp_path / "b" / "tokenizer" / "tokenizer.json").read_bytes()
    assert copied == (checkpoint / "tokenizer.json").read_bytes()


def test_the_same_input_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever the number of workers and the size of the blocks."""
    quantize(checkpoint, tmp_path / "one")
    quantize(checkpoint, tmp_path / "four", workers=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "four")


def test_blocks_of_rows_change_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(checkpoint, tmp_path / "whole")
    monkeypatch.setattr("kttools.quantize.convert.ROWS_BYTES", 1000)
    quantize(checkpoint, tmp_path / "blocks", workers=3)
    whole, blocks = contents(tmp_path / "whole"), contents(tmp_path / "blocks")
    changed = {path for path in whole if whole[path] != blocks[path]}
    assert changed == set()


def test_stacked_experts_give_the_same_packs(checkpoint: Path, tmp_path: Path) -> None:
    values = config(**SIZES)
    stacked = save_model(tmp_path / "stacked", values, stack_experts(hub_tensors(values), values, fuse=True))
    quantize(checkpoint, tmp_path / "a")
    quantize(stacked, tmp_path / "b")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    packs = [path for path in a if path.endswith(".ktpack")]
    assert packs
    assert all(a[path] == b[path] for path in packs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("cpu", "gpu"), [("bf16", "bf16"), ("int8", "int4")])
def test_other_source_dtypes(tmp_path: Path, dtype: torch.dtype, cpu: str, gpu: str) -> None:
    """F16 and F32 sources: linears are rounded to their format, all else keeps its dtype."""
    values = config(**SIZES)
    tensors = {name: (t.float() / 3).to(dtype) for name, t in hub_tensors(values).items()}
    source = save_model(tmp_path / "source", values, tensors)
    outcome = quantize(source, tmp_path / "b", cpu=cpu, gpu=gpu)
    stored = stored_tensors(tmp_path / "b")
    if gpu == "bf16":
        for error in outcome.errors:
            rounded = tensors[error.name].to(torch.bfloat16)
            assert torch.equal(stored[error.name].to(torch.bfloat16), rounded)
            assert 0 < error.relative_rms < 2**-8
    norm = "model.norm.weight"
    assert torch.equal(stored[norm], tensors[norm])


def test_models_without_experts_or_head(tmp_path: Path) -> None:
    for name, changes in {
        "dense": {"first_k_dense_replace": 4},
        "tied": {"tie_word_embeddings": True},
    }.items():
        values = config(**(SIZES | changes))
        source = save_model(tmp_path / name, values, hub_tensors(values))
        quantize(source, tmp_path / f"{name}-b")
        assert verify_bundle(tmp_path / f"{name}-b").problems == []
    assert load_manifest(tmp_path / "dense-b").experts == {}
    assert "lm_head" not in load_manifest(tmp_path / "tied-b").linears


BAD_TENSORS = [
    "model.layers.2.mlp.experts.4.down_proj.weight",
    "model.layers.3.mlp.experts.0.gate_proj.weight",
    "model.layers.1.self_attn.q_a_proj.weight",
    "lm_head.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
    "model.layers.1.mlp.gate.e_score_correction_bias",
]


@pytest.mark.parametrize("name", BAD_TENSORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("formats", [("int8", "int4"), ("bf16", "bf16")])
def test_weights_that_are_no_numbers_are_named(
    tmp_path: Path, name: str, bad: float, formats: tuple[str, str]
) -> None:
    values = config(**SIZES)
    tensors = hub_tensors(values)
    place = tuple(size - 2 for size in tensors[name].shape)
    tensors[name][place] = bad
    source = save_model(tmp_path / "source", values, tensors)
    with pytest.raises(InvalidInputError) as caught:
        quantize(source, tmp_path / "b", cpu=formats[0], gpu=formats[1])
    assert f"tensor {name}: the weight at {list(place)} is not a finite number" in str(caught.value)
    assert list((tmp_path / "b").rglob("*.part")) == []
    assert not (tmp_path / "b" / "bundle.json").exists()


def test_weights_too_large_for_bf16_are_refused(tmp_path: Path) -> None:
    values = config(**SIZES)
    tensors = {name: t.float() for name, t in hub_tensors(values).items()}
    name = "model.layers.2.mlp.experts.4.down_proj.weight"
    tensors[name][0, 0] = 3.4e38
    source = save_model(tmp_path / "source", values, tensors)
    with pytest.raises(InvalidInputError, match="a weight is too large for bf16"):
        quantize(source, tmp_path / "b", cpu="bf16", gpu="bf16")


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = config(**SIZES)
    source = save_model(tmp_path / "source", values, hub_tensors(values))
    original = writer.sha256_file

    def touching(file: Path, on_bytes: Any = None) -> str:
        os.utime(source / "model.safetensors", ns=(1, 1))
        return original(file, on_bytes)

    monkeypatch.setattr(writer, "sha256_file", touching)
    with pytest.raises(InvalidInputError, match="files changed while they were read"):
        quantize(source, tmp_path / "b")
    assert not (tmp_path / "b" / "bundle.json").exists()


def test_packs_verify(checkpoint: Path, tmp_path: Path) -> None:
    quantize(checkpoint, tmp_path / "b")
    for layer, expert in load_manifest(tmp_path / "b").experts.items():
        header = verify_pack(tmp_path / "b" / expert.file)
        assert header.layer == layer
        assert set(header.formats) == {expert.format}


def test_extra_tensors_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    values = config(**SIZES)
    source = save_model(tmp_path / "source", values, hub_tensors(values))
    save(source / "model.safetensors", hub_tensors(values) | {"model.layers.0.odd": torch.zeros(2)})
    with pytest.raises(InvalidInputError, match="unexpected tensor"):
        quantize(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()
