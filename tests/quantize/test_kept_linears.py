"""Attention, MLPs, head and embedding of a GGUF file kept in its blocks, from the file to the logits."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from kttools.bundle.inspect import inspect_path
from kttools.bundle.verify import verify_bundle
from kttools.checkpoint.gguf.header import GgufTensor
from kttools.checkpoint.gguf.types import BY_NAME, decode
from kttools.checkpoint.gguf.views import Interleaved
from kttools.eval.diff import compare
from kttools.families import open_model
from kttools.model_source import open_source
from kttools.plan.layout import bundle_layout, source_layout
from kttools.quantize.blocks import default_gpu_format
from kttools.quantize.plan import make_plan, render_plan
from kttools.quantize.recipe import make_recipe
from kttools.quantize.writer import Quantizer
from kttools_runtime import load, strict_json
from kttools_runtime.block_formats import BLOCK_FORMATS
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.footprint import held_bytes
from kttools_runtime.linear import LinearSpec, PackedCpuLinear, Placement
from kttools_runtime.manifest import load_manifest
from kttools_runtime.shards import ShardWeights
from tests.checkpoint import gguf_forge
from tests.checkpoint.gguf_forge import U32, Tensor
from tests.quantize.conftest import contents
from tests.quantize.test_blocks import random_blocks

HIDDEN, Q_RANK = 256, 256
# What each tensor is stored as, and the format that keeps it.
KINDS = {
    "token_embd": ("Q4_K", "model.embed_tokens", "q4_k"),
    "output": ("Q6_K", "lm_head", "q6_k"),
    "blk.0.attn_q_a": ("Q4_K", "model.layers.0.self_attn.q_a_proj", "q4_k"),
    "blk.0.attn_q_b": ("Q5_K", "model.layers.0.self_attn.q_b_proj", "q5_k"),
    "blk.0.attn_kv_a_mqa": ("Q8_0", "model.layers.0.self_attn.kv_a_proj_with_mqa", "q8_0"),
    "blk.0.ffn_gate": ("Q4_K", "model.layers.0.mlp.gate_proj", "q4_k"),
    "blk.0.ffn_up": ("Q5_1", "model.layers.0.mlp.up_proj", "int8"),
    "blk.1.ffn_gate_shexp": ("Q4_K", "model.layers.1.mlp.shared_experts.gate_proj", "q4_k"),
    "blk.1.ffn_up_shexp": ("Q4_K", "model.layers.1.mlp.shared_experts.up_proj", "q4_k"),
    "blk.1.ffn_down_shexp": ("Q5_0", "model.layers.1.mlp.shared_experts.down_proj", "q8_0"),
    "blk.1.attn_q_b": ("F32", "model.layers.1.self_attn.q_b_proj", "bf16"),
    "blk.1.attn_k_b": ("F32", "model.layers.1.self_attn.kv_b_proj", "bf16"),
}
KEPT = {name: entry for name, entry in KINDS.items() if entry[2] not in ("bf16", "int8")}


def rows_of(name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    rows = random_blocks(kind, shape[0], shape[1], len(name))
    if kind == "Q5_1":  # a minimum beside the scale
        rows.reshape(shape[0], -1, 24)[:, :, 2:4] = rows.reshape(shape[0], -1, 24)[:, :, :2]
    return rows


def save(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model whose matrices are stored as KINDS says."""
    monkeypatch.setitem(gguf_forge.SIZES, "hidden", HIDDEN)
    monkeypatch.setitem(gguf_forge.SIZES, "q_rank", Q_RANK)
    sizes = {"embedding_length": HIDDEN, "attention.q_lora_rank": Q_RANK}
    image = gguf_forge.deepseek2(**{f"deepseek2.{name}": (U32, size) for name, size in sizes.items()})
    for index, tensor in enumerate(image.tensors):
        name = str(tensor.name).removesuffix(".weight")
        kind = KINDS.get(name, ("F32",))[0]
        if kind != "F32":
            data = rows_of(name, kind, tuple(reversed(tensor.dims))).tobytes()
            image.tensors[index] = Tensor(tensor.name, tensor.dims, BY_NAME[kind].number, data)
    return image.save(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return save(tmp_path_factory.mktemp("gguf") / "m.gguf", patch)


def make(source: Path, bundle: Path, gpu: str = "q4_k", recipe: Path | None = None) -> Path:
    Quantizer(make_plan(open_model(source), make_recipe("bf16", gpu, 32, recipe)), bundle).run()
    return bundle


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(source, tmp_path_factory.mktemp("kept") / "b")


def shards_of(bundle: Path) -> ShardWeights:
    manifest = load_manifest(bundle)
    return ShardWeights(sorted(bundle.glob("shards/*.safetensors")), manifest.linears)


@pytest.mark.parametrize("name", KEPT)
def test_the_shards_hold_the_files_numbers(source: Path, bundle: Path, name: str) -> None:
    """Against the gguf package on the very bytes of the file."""
    kind, base, form = KINDS[name]
    shape = next(t.shape for t in open_model(source).tensors if t.name == f"{base}.weight")
    rows = rows_of(name, kind, shape)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(BY_NAME[kind].number))
    matrix = shards_of(bundle).linear(base, *shape)
    assert matrix.format == form
    assert np.array_equal(matrix.dequantized().numpy(), np.asarray(expected, dtype=np.float32))
    if kind != "Q5_0":
        assert matrix.parts["blocks"].numpy().tobytes() == rows.tobytes()


def test_every_format_is_what_was_asked(source: Path, bundle: Path) -> None:
    """Blocks we do not keep are int8, floats and parts that are joined bf16; all is written down."""
    manifest = load_manifest(bundle)
    assert {base: manifest.linears[base] for _, base, _ in KINDS.values()} == {
        base: form for _, base, form in KINDS.values()
    }
    assert manifest.recipe["gpu_format"] == "q4_k"
    report = json.loads((bundle / "quantization-report.json").read_text())
    blocks = [entry for entry in report["tensors"] if entry["format"] in ("q4_k", "q5_k", "q6_k", "q8_0")]
    assert {entry["max_abs_error"] for entry in blocks} == {0}
    assert len(blocks) == len(KEPT)
    by_format = inspect_path(bundle)["bytes"]["by_format"]
    assert by_format["linears q6_k"] == 100 * 210
    plan = make_plan(open_model(source), make_recipe("bf16", "q4_k", 32))
    text = render_plan(plan, Quantizer(plan, source.parent / "nowhere").resources())
    assert "1 int8 and 5 q4_k and 1 q5_k and 1 q6_k and 2 q8_0" in text


def test_the_bundle_is_sound_and_exact(source: Path, bundle: Path, tmp_path: Path) -> None:
    assert verify_bundle(bundle).problems == []
    errors = {error.name: error for error in compare(open_source(source), open_source(bundle)).errors}
    for _, base, form in KINDS.values():
        assert (errors[f"{base}.weight"].max_abs_error == 0) == (form not in ("int8", "bf16")), base
    assert contents(make(source, tmp_path / "again")) == contents(bundle)


def test_plan_and_footprint_are_what_there_is(source: Path, bundle: Path) -> None:
    planned = source_layout(open_model(source), "bf16", "q4_k", 32)
    found = bundle_layout(bundle)
    assert {t.name: t for t in planned.tensors} == {t.name: t for t in found.tensors}
    assert planned.shard_bytes == found.shard_bytes
    shards, engine = shards_of(bundle), ExpertEngine(1)
    place = Placement(shards, torch.device("cpu"), torch.bfloat16, engine.native)
    for tensor in found.tensors:
        base = tensor.name.removesuffix(".weight")
        if tensor.format in ("q4_k", "q5_k", "q6_k", "q8_0") and base != "model.embed_tokens":
            linear = place.linear(LinearSpec(base, tensor.shape[0]), tensor.shape[1])
            assert isinstance(linear, PackedCpuLinear)
            assert held_bytes(tensor, found.config) == linear.packed.nbytes, base
    embedding = next(t for t in found.tensors if t.name == "model.embed_tokens.weight")
    assert held_bytes(embedding, found.config) == shards.infos["model.embed_tokens.blocks"].bytes


def test_it_runs_natively_and_on_a_device(
    source: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the float32 logits of the same numbers: few tokens, a prompt, and the device's int8."""
    tokens = torch.arange(2, 34)
    expected = load(bundle, dtype="float32", threads=1).logits(tokens)
    model = load(bundle, threads=2)
    assert all(layer.native is not None for layer in model.layers)
    assert _error(model.logits(tokens), expected) < 0.05
    cache = model.new_cache(64)
    rows = torch.stack([model.decode(token, cache) for token in tokens.tolist()])
    assert _error(rows, expected) < 0.05
    assert torch.equal(load(bundle, threads=1).logits(tokens), model.logits(tokens))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hybrid = load(bundle, device="cpu:0", threads=1, prefill="cpu")
    assert _error(hybrid.logits(tokens), expected) < 0.08


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the median token: of random weights the router sends some to other experts."""
    return float(((got - expected).norm(dim=1) / expected.norm(dim=1)).median())


def test_what_quantize_chooses(source: Path, tmp_path: Path, checkpoint: Path) -> None:
    assert default_gpu_format(open_model(source)) == "q4_k"
    assert default_gpu_format(open_model(checkpoint)) == "int4"
    assert default_gpu_format(open_model(gguf_forge.deepseek2().save(tmp_path / "f32.gguf"))) == "int4"


def test_rules_may_keep_some_linears(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("lm_head = q4_k\nlayers.0.**.q_a_proj = q4_k\n")
    manifest = load_manifest(make(source, tmp_path / "b", "int8", recipe))
    kept = {base: form for base, form in manifest.linears.items() if form.startswith("q")}
    assert kept == {"lm_head": "q6_k", "model.layers.0.self_attn.q_a_proj": "q4_k"}
    recipe.write_text("layers.0.mlp.up_proj = q4_k\n")
    with pytest.raises(InvalidInputError, match=r"up_proj\.weight is Q5_1; q4_k keeps the blocks"):
        make(source, tmp_path / "c", "int8", recipe)


def test_a_source_without_blocks_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InvalidInputError, match="no linear is stored in blocks that --gpu-format q4_k"):
        make_plan(open_model(checkpoint), make_recipe("int8", "q4_k", 32))


def test_a_damaged_scale_is_refused(source: Path, tmp_path: Path) -> None:
    data = bytearray(source.read_bytes())
    rows = rows_of("output", "Q6_K", (100, HIDDEN))
    at = data.index(rows[7].tobytes()) + 208
    data[at : at + 2] = b"\x00\x7e"
    damaged = tmp_path / "m.gguf"
    damaged.write_bytes(data)
    with pytest.raises(InvalidInputError, match=r"lm_head\.weight: the scale of the block at \[7, 0\]"):
        make(damaged, tmp_path / "b")


@pytest.mark.parametrize(
    ("base", "form", "message"),
    [
        ("lm_head", "q4_k", "lm_head.blocks: expected U8 [100, 144] of q4_k, got U8 [100, 210]"),
        ("lm_head", "int8", "int8 linear lm_head has no tensor lm_head.qweight"),
        ("model.norm", "q4_k", "model.norm is no linear of this model"),
        ("model.embed_tokens", "bf16", "model.embed_tokens is no linear of this model"),
    ],
)
def test_a_manifest_that_lies_is_named(
    bundle: Path, tmp_path: Path, base: str, form: str, message: str
) -> None:
    copy = tmp_path / "b"
    shutil.copytree(bundle, copy)
    rewrite(copy, {**load_manifest(bundle).linears, base: form})
    assert any(message in problem for problem in verify_bundle(copy, is_quick=True).problems)


def rewrite(bundle: Path, linears: dict[str, str]) -> None:
    document = strict_json.read_object(bundle / "bundle.json") | {"linears": linears}
    del document["manifest_sha256"]
    document["manifest_sha256"] = hashlib.sha256(strict_json.canonical(document)).hexdigest()
    (bundle / "bundle.json").write_bytes(strict_json.canonical(document))


def test_the_page_has_the_blocks_of_the_code(repo: Path) -> None:
    page = (repo / "docs" / "shards.md").read_text(encoding="ascii").split("## Blocks")[1]
    rows = re.findall(r"^\| (q\d_\w) \| (\w+) \| (\d+) \| (\d+) \|", page, re.MULTILINE)
    assert rows == [(n, b.ggml, str(b.inputs), str(b.bytes)) for n, b in BLOCK_FORMATS.items()]


def test_rows_of_rotary_halves_keep_their_bytes(tmp_path: Path) -> None:
    """llama's order of query rows: the bytes of a row go where its numbers go."""
    rows = random_blocks("Q8_0", 24, 64, 3)
    file = tmp_path / "x"
    file.write_bytes(bytes(16) + rows.tobytes())
    tensor = GgufTensor("q", BY_NAME["Q8_0"], (24, 64), rows.size, file, 16)
    view = Interleaved(tensor, 3)
    for begin, end in ((0, 24), (5, 17)):
        raw = view.raw_rows(begin, end)
        assert torch.equal(decode(raw, BY_NAME["Q8_0"], 64), view.rows(begin, end))
