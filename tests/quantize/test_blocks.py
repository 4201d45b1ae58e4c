"""GGUF files whose blocks stay as they are: the bundle holds the file's numbers, and says so."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from kttools.bundle.inspect import inspect_path
from kttools.bundle.verify import verify_bundle
from kttools.checkpoint.gguf.types import BY_NAME
from kttools.eval.diff import compare
from kttools.families import open_model
from kttools.model_source import open_source
from kttools.quantize.blocks import KEPT, WIDENED, default_cpu_format, kept_format, widened
from kttools.quantize.plan import make_plan
from kttools.quantize.recipe import make_recipe
from kttools.quantize.writer import Quantizer
from kttools_runtime import _kernels, load
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.manifest import load_manifest
from kttools_runtime.pack import map_pack, read_pack_header
from tests.checkpoint import gguf_forge
from tests.checkpoint.gguf_forge import U32, Tensor
from tests.quantize.conftest import contents

HIDDEN, INNER, EXPERTS = 256, 32, 4
MIXED = {"gate": "Q4_K", "up": "Q4_K", "down": "Q5_0"}  # what llama.cpp makes of such sizes


def random_blocks(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """uint8 [rows, bytes]: random codes and integer scales, float16 scales near 1/100."""
    entry = BY_NAME[kind]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, columns // entry.block, entry.bytes), dtype=np.uint8)
    for at in {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (0,)):
        data[:, :, at : at + 2] = (
            rng.uniform(0.001, 0.002, data.shape[:2]).astype("<f2")[..., None].view(np.uint8)
        )
    return data.reshape(rows, -1)


def expert_rows(kinds: dict[str, str], name: str) -> np.ndarray:
    """All experts of ffn_{name}_exps, one after the other."""
    rows, columns = (HIDDEN, INNER) if name == "down" else (INNER, HIDDEN)
    return random_blocks(kinds[name], EXPERTS * rows, columns, 40 + len(name))


def save(path: Path, kinds: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model whose experts are stored in these types."""
    monkeypatch.setitem(gguf_forge.SIZES, "hidden", HIDDEN)
    image = gguf_forge.deepseek2(**{"deepseek2.embedding_length": (U32, HIDDEN)})
    for index, tensor in enumerate(image.tensors):
        for name, kind in kinds.items():
            if tensor.name == f"blk.1.ffn_{name}_exps.weight":
                data = expert_rows(kinds, name).tobytes()
                image.tensors[index] = Tensor(tensor.name, tensor.dims, BY_NAME[kind].number, data)
    return image.save(path)


def make(source: Path, bundle: Path, cpu: str = "q4_k", recipe: Path | None = None) -> Path:
    Quantizer(make_plan(open_model(source), make_recipe(cpu, "bf16", 32, recipe)), bundle).run()
    return bundle


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return save(tmp_path / "m.gguf", MIXED, monkeypatch)


@pytest.mark.parametrize("down", ["Q8_0", "Q5_0", "Q4_0", "IQ4_NL"])
@pytest.mark.parametrize("gate_up", ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_0"])
def test_the_pack_holds_the_files_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate_up: str, down: str
) -> None:
    kinds = {"gate": gate_up, "up": gate_up, "down": down}
    bundle = make(save(tmp_path / "m.gguf", kinds, monkeypatch), tmp_path / "b")
    header, blobs = map_pack(bundle / "experts/layer-00001.ktpack")
    into = {**KEPT, **WIDENED}[gate_up]
    assert set(header.formats) == {into if into == "q8_0" else f"{into}_q8_0"}
    expected = {}
    for name, kind in kinds.items():
        qtype = gguf.GGMLQuantizationType(BY_NAME[kind].number)
        rows = np.asarray(gguf.quants.dequantize(expert_rows(kinds, name), qtype), dtype=np.float32)
        expected[name] = rows.reshape(EXPERTS, -1, rows.shape[1])
    for index, blob in enumerate(blobs):
        got = _kernels.unpack_expert(header.formats[index], blob, HIDDEN, INNER)
        for name, matrix in zip(("gate", "up", "down"), got, strict=True):
            assert np.array_equal(matrix, expected[name][index])


def test_the_bundle_is_sound_and_exact(source: Path, tmp_path: Path) -> None:
    bundle = make(source, tmp_path / "b")
    assert verify_bundle(bundle).problems == []
    report = json.loads((bundle / "quantization-report.json").read_text())
    experts = [entry for entry in report["tensors"] if entry["role"] == "expert"]
    assert {entry["format"] for entry in experts} == {"q4_k", "q8_0"}
    assert {entry["max_abs_error"] for entry in experts} == {0}
    assert load_manifest(bundle).experts[1].format == "q4_k_q8_0"
    assert "experts q4_k_q8_0" in inspect_path(bundle)["bytes"]["by_format"]
    errors = compare(open_source(source), open_source(bundle)).errors
    found = [error.max_abs_error for error in errors if error.role == "expert"]
    assert found == [0.0] * 3 * EXPERTS


def test_it_runs(source: Path, tmp_path: Path) -> None:
    """Next to the same file in bf16 experts: activations in 8 bits are what differs."""
    logits = {}
    for name in ("q4_k", "bf16"):
        model = load(make(source, tmp_path / name, name), dtype="float32", threads=1)
        logits[name] = model.logits([5, 17, 3, 8])
    error = (logits["q4_k"] - logits["bf16"]).norm() / logits["bf16"].norm()
    assert 0 < error < 0.03


def test_the_same_bytes_again(source: Path, tmp_path: Path) -> None:
    assert contents(make(source, tmp_path / "a")) == contents(make(source, tmp_path / "b"))


def test_rules_may_keep_some_experts(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("layers.1.experts.1-2 = q4_k\n")
    bundle = make(source, tmp_path / "b", "int8", recipe)
    header = read_pack_header(bundle / "experts/layer-00001.ktpack")
    assert header.formats == ("int8", "q4_k_q8_0", "q4_k_q8_0", "int8")
    recipe.write_text("lm_head = q4_k\n")
    with pytest.raises(InvalidInputError, match=r"lm_head\.weight is F32; q4_k keeps the blocks"):
        make(source, tmp_path / "c", "int8", recipe)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (MIXED, "q4_k"),
        ({"gate": "Q6_K", "up": "Q6_K", "down": "Q8_0"}, "q4_k"),
        ({"gate": "Q8_0", "up": "Q8_0", "down": "Q8_0"}, "int8"),
        ({"gate": "Q4_K", "up": "Q4_K", "down": "Q5_1"}, "int8"),
        ({}, "int8"),
    ],
)
def test_what_quantize_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: dict[str, str], expected: str
) -> None:
    assert default_cpu_format(open_model(save(tmp_path / "m.gguf", kinds, monkeypatch))) == expected


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"gate": "Q4_K", "up": "Q6_K", "down": "Q8_0"}, "gate is q4_k and up q6_k"),
        ({"gate": "Q4_K", "up": "Q4_K", "down": "Q5_1"}, "down_proj is Q5_1"),
        ({}, "gate_proj is F32; --cpu-format q4_k keeps the blocks"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: dict[str, str], message: str
) -> None:
    model = open_model(save(tmp_path / "m.gguf", kinds, monkeypatch))
    with pytest.raises(InvalidInputError, match=message):
        kept_format(model, 1, 0)


def test_safetensors_are_refused(checkpoint: Path) -> None:
    with pytest.raises(InvalidInputError, match="is BF16; --cpu-format q4_k keeps the blocks of a GGUF"):
        make_plan(open_model(checkpoint), make_recipe("q4_k", "int8", 32))


def test_a_damaged_scale_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "m.gguf", MIXED, monkeypatch)
    data = bytearray(source.read_bytes())
    wanted = expert_rows(MIXED, "up")[2 * INNER : 2 * INNER + 1].tobytes()
    at = data.index(wanted)
    data[at : at + 2] = b"\x00\x7e"
    source.write_bytes(data)
    with pytest.raises(
        InvalidInputError, match=r"layer 1, expert 2: .*row 0, column 0 is not a finite number"
    ):
        make(source, tmp_path / "b")


@pytest.mark.parametrize("kind", WIDENED)
def test_widened_blocks_are_the_same_numbers(kind: str) -> None:
    """Every code of a block, and scales of both signs, zero and denormal."""
    entry = BY_NAME[kind]
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, (64, entry.bytes), dtype=np.uint8)
    scales = np.array([0.0, -0.0, 6e-8, 65504.0, -1.5, *rng.standard_normal(59)], dtype="<f2")
    data[:, :2] = scales[:, None].view(np.uint8)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(entry.number))
    got = gguf.quants.dequantize(widened(kind, data).reshape(64, 34), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(got.reshape(-1), np.asarray(expected).reshape(-1))
