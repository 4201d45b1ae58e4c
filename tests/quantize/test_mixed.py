"""A bundle whose experts and linears have formats of their own: each is what it would be alone."""

import json
from pathlib import Path

import pytest
import torch

from kttools.bundle.inspect import inspect_path
from kttools.bundle.render import render
from kttools.bundle.verify import verify_bundle
from kttools.families import open_model
from kttools.quantize.plan import make_plan
from kttools.quantize.recipe import make_recipe
from kttools.quantize.writer import Quantizer
from kttools_runtime import ExpertEngine, load
from kttools_runtime.manifest import load_manifest
from kttools_runtime.pack import map_pack
from kttools_runtime.shards import ShardWeights
from tests.quantize.conftest import SIZES, contents, quantize, run

RECIPE = """\
layers.*.experts.* = int8
layers.2.experts.1,4 = int4_g32
layers.2.experts.2-3 = bf16
layers.1.self_attn.o_proj = int4_g64
layers.2.self_attn.* = bf16
lm_head = int4
"""
LAYER = 2
EXPERTS = ("int8", "int4_g32", "bf16", "bf16", "int4_g32", "int8")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    (root / "recipe.txt").write_text(RECIPE)
    plan = make_plan(open_model(checkpoint), make_recipe("bf16", "int8", 32, root / "recipe.txt"))
    Quantizer(plan, root / "b").run()
    return root / "b"


@pytest.fixture(scope="module")
def uniform(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same checkpoint with all experts in one format, by format."""
    root = tmp_path_factory.mktemp("uniform")
    for name in set(EXPERTS):
        quantize(checkpoint, root / name, cpu=name, gpu="bf16")
    return {name: root / name for name in set(EXPERTS)}


def test_the_manifest_and_inspect_say_it(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert manifest.experts[LAYER].formats == EXPERTS
    assert manifest.experts[LAYER].format == "mixed"
    assert (manifest.experts[1].format, manifest.experts[1].formats) == ("int8", ())
    assert manifest.recipe["rules"] == RECIPE.splitlines()
    assert manifest.linears["model.layers.1.self_attn.o_proj"] == "int4"
    assert manifest.linears["model.layers.2.self_attn.q_a_proj"] == "bf16"
    assert manifest.linears["lm_head"] == "int4"
    assert verify_bundle(bundle).problems == []
    report = inspect_path(bundle)
    by_format = report["bytes"]["by_format"]
    assert by_format["experts bf16"] > by_format["experts int4_g32"] > 0
    experts = sum(count for name, count in by_format.items() if name.startswith("experts "))
    assert experts == report["bytes"]["experts"]
    text = render(report)
    assert "3 layers, int8, mixed (2 bf16, 2 int4_g32, 2 int8)" in text


def test_blobs_are_those_of_uniform_packs(bundle: Path, uniform: dict[str, Path]) -> None:
    _, blobs = map_pack(load_manifest(bundle).expert_path(LAYER))
    for expert, name in enumerate(EXPERTS):
        _, alone = map_pack(load_manifest(uniform[name]).expert_path(LAYER))
        assert blobs[expert].tobytes() == alone[expert].tobytes()


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_layer_is_the_sum_of_its_experts(
    bundle: Path, uniform: dict[str, Path], num_tokens: int, dtype: torch.dtype
) -> None:
    """Each expert alone gives the bits of its uniform layer; together they add up."""
    engine = ExpertEngine(2)
    layer = engine.layer_from_pack(load_manifest(bundle).expert_path(LAYER))
    alone = {
        name: engine.layer_from_pack(load_manifest(path).expert_path(LAYER)) for name, path in uniform.items()
    }
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, SIZES["hidden_size"], generator=generator).to(dtype)
    expected = torch.zeros(num_tokens, SIZES["hidden_size"], dtype=torch.float64)
    for expert, name in enumerate(EXPERTS):
        ids = torch.full((num_tokens, 1), expert)
        weights = torch.full((num_tokens, 1), 0.5 + expert / 8)
        single = layer.forward(x, ids, weights)
        assert torch.equal(single, alone[name].forward(x, ids, weights)), (expert, name)
        expected += single
    ids = torch.arange(len(EXPERTS)).expand(num_tokens, -1).contiguous()
    out = layer.forward(x, ids, (0.5 + ids / 8).to(torch.float32))
    largest = expected.abs().max().item()
    # Six float32 additions of sums of that size, and one rounding of each product.
    assert not (out - expected).abs().max().item() > 12 * 2**-24 * 2 * largest


def test_linears_have_their_group(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    files = [manifest.path(name) for name in manifest.files if name.endswith(".safetensors")]
    shards = ShardWeights(files, manifest.linears)
    config = manifest.model
    out = shards.linear(
        "model.layers.1.self_attn.o_proj", config.hidden_size, config.num_attention_heads * config.v_head_dim
    )
    head = shards.linear("lm_head", config.vocab_size, config.hidden_size)
    assert (out.format, out.group_size) == ("int4", 64)
    assert (head.format, head.group_size) == ("int4", 32)


def test_it_computes(checkpoint: Path, bundle: Path, uniform: dict[str, Path], tmp_path: Path) -> None:
    """Rules that say what the options say give the same logits; the mixed bundle gives others."""
    (tmp_path / "recipe.txt").write_text("** = bf16\n")
    recipe = make_recipe("int8", "int4", 32, tmp_path / "recipe.txt")
    Quantizer(make_plan(open_model(checkpoint), recipe), tmp_path / "b").run()
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    ruled, exact, mixed = (
        load(path, threads=1).logits(tokens) for path in (tmp_path / "b", uniform["bf16"], bundle)
    )
    assert torch.equal(ruled, exact)
    assert torch.isfinite(mixed).all()
    assert not torch.equal(mixed, exact)


def test_on_the_command_line(checkpoint: Path, tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "recipe.txt").write_text(RECIPE)
    options = ("--recipe", str(tmp_path / "recipe.txt"), "--cpu-format", "bf16", "--gpu-format", "int8")
    done = run(checkpoint, tmp_path / "b", *options, "--group-size", "32", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "3 packs, 2 bf16 and 2 int4_g32 and 14 int8" in done.stdout
    assert "layers.2.experts.2-3 = bf16" in done.stdout
    assert contents(tmp_path / "b") == contents(bundle)
    planned = run(checkpoint, tmp_path / "c", *options, "--dry-run", "--json")
    plan = json.loads(planned.stdout)["plan"]
    assert plan["formats"]["experts"] == {"bf16": 2, "int4_g32": 2, "int8": 14}
    assert plan["packs"][1]["formats"] == {"bf16": 2, "int4_g32": 2, "int8": 2}
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lm_head = int8\nlayers.0.experts.0 = int8\n", "recipe.txt:2: layers.0.experts.0 matches no expert"),
        ("model.norm = int8\n", "recipe.txt:1: norm matches no expert and no linear"),
        ("\nlm_head = int3\n", "recipe.txt:2: unknown format 'int3'"),
    ],
)
def test_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "recipe.txt").write_text(text)
    done = run(checkpoint, tmp_path / "b", "--recipe", str(tmp_path / "recipe.txt"))
    assert done.returncode == 3
    assert message in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "b").exists()
