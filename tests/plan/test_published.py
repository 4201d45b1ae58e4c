"""Plans of released models, from their config.json alone, against what others publish; GPUs; remedies."""

import json
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from kttools import cli
from tests.families.released import RELEASED
from tests.plan.released_v3 import DEEPSEEK_V3, KIMI_K2

jsonschema = pytest.importorskip("jsonschema")

GIB = 1 << 30
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "DeepSeek-V3": (DEEPSEEK_V3, 671.0),
    "Kimi-K2": (KIMI_K2, 1026.4),
    **{
        name: RELEASED[name]
        for name in ("DeepSeek-V2-Lite", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "GLM-4.5-Air")
    },
}
MACHINE = ("--bandwidth", "500", "--tops", "100", "-t", "64", "--nodes", "2", "--dram", "4T", "--quiet")


@pytest.fixture
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MODELS[request.param][0]))
    return path


def plan(capsys: pytest.CaptureFixture[str], *line: str, code: int = 0) -> tuple[dict[str, Any], str]:
    assert cli.main(["plan", *line, "--json", *MACHINE]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


V3 = pytest.mark.parametrize("directory", ["DeepSeek-V3"], indirect=True)


@pytest.mark.parametrize("directory", list(MODELS), indirect=True)
def test_every_byte_of_the_weights_is_somewhere(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In bf16 RAM and VRAM hold two bytes for each parameter that the authors state; all parts add up."""
    formats = ("--cpu-format", "bf16", "--gpu-format", "bf16")
    for gpus in ("0", "1", "3"):
        document, _ = plan(capsys, str(directory), *formats, "--gpus", gpus, "--vram", "800G")
        schema = files("kttools.plan").joinpath("schemas", "plan.schema.json").read_text(encoding="utf-8")
        jsonschema.Draft202012Validator(json.loads(schema)).validate(document)
        ram, devices = document["ram_bytes"], document["devices"]
        assert len(devices) == int(gpus)
        held = ram["experts_mapped"] + ram["dense"] + sum(sum(d["weight_bytes"].values()) for d in devices)
        assert held == pytest.approx(2e9 * MODELS[directory.name][1], rel=0.012)
        assert sum(ram.values()) == 2 * ram["total"]
        assert sum(document["numa"]["node_bytes"]) == ram["total"]
        last = 0
        for device in devices:
            parts = ("cache", "workspace_estimate", "graph_allowance", "context_allowance", "hot_expert")
            rest = sum(device[f"{part}_bytes"] for part in parts)
            assert device["total_bytes"] == sum(device["weight_bytes"].values()) + rest
            assert device["layers"][0] == last
            last = device["layers"][1]
        if devices:
            assert last == len(layers_of(directory))
            assert max(d["total_bytes"] for d in devices) < 1.5 * min(d["total_bytes"] for d in devices)


def layers_of(directory: Path) -> range:
    return range(json.loads((directory / "config.json").read_text())["num_hidden_layers"])


@V3
def test_deepseek_v3_int8_beside_the_published_644_gb(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """KTransformers V0.3 (int8 on the CPU, int4 on the GPU): "644 GB" of RAM, "at least 14 GB" of VRAM. The
    routed experts alone are 653.9 G weights, so that the figure must be in GiB, or rounded."""
    document, _ = plan(capsys, str(directory), "--gpus", "1", "--vram", "24G", "--cache_lens", "8192")
    total = document["ram_bytes"]["total"]
    assert total == pytest.approx(644 * GIB, rel=0.055)
    assert total == pytest.approx(644e9, rel=0.03)
    device = document["devices"][0]
    assert device["total_bytes"] < 14e9
    assert sum(device["weight_bytes"].values()) < 11.5e9
    whole = plan(capsys, str(directory), "--gpus", "1", "--cache_lens", "32768")[0]
    assert whole["devices"][0]["total_bytes"] < 14 * GIB


@V3
def test_deepseek_v3_in_4_bits_beside_the_published_382_gb(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """KTransformers V0.2 with Q4_K_M: "382 GB". Q4_K_M has 4.5 bits a weight, but 6.5625 in about half of the
    down matrices: 4.84 on average. Ours of 4.25 bits differs by just that."""
    document, _ = plan(capsys, str(directory), "--cpu-format", "int4", "--gpus", "1")
    total, experts = document["ram_bytes"]["total"], document["ram_bytes"]["experts_mapped"]
    q4_k_m = 653.9e9 * (4.5 * (2 / 3 + 1 / 6) + 6.5625 / 6) / 8
    assert (total - experts + q4_k_m) == pytest.approx(382 * GIB, rel=0.03)
    assert experts == pytest.approx(653.9e9 * 4.25 / 8, rel=3e-3)


@V3
def test_a_bundle_that_keeps_q4_k_m_beside_the_published_382_gb(directory: Path) -> None:
    """Half of the layers with Q6_K down matrices, as llama.cpp mixes them: sizes by the pack code, summed by
    the plan, and where each byte goes. The dense part is on a GPU."""
    from dataclasses import replace

    from kttools.plan.choice import Choice, open_subject
    from kttools.plan.memory import Machine, needs
    from kttools_runtime.hybrid.hot_request import HotRequest

    made = open_subject(directory).layout(Choice("int4", "int4", 8192, "off", 64))
    kept = {
        layer: (("q4_k", "q4_k_q6_k")[index % 2],) * 256 for index, layer in enumerate(made.config.moe_layers)
    }
    pack_bytes = sum(made.expert_bytes(name) for names in kept.values() for name in names)
    layout = replace(made, expert_formats=kept, pack_bytes=pack_bytes)
    found = needs(layout, 8192, "off", 64, Machine(1 << 40, (24 << 30,), 1), HotRequest(None, {}))
    assert set(layout.bytes_by_format) == {"q4_k", "q4_k_q6_k"}
    assert sum(layout.bytes_by_format.values()) == found.ram.experts == pack_bytes
    assert pack_bytes == pytest.approx(653.9e9 * (4.5 * (2 / 3 + 1 / 6) + 6.5625 / 6) / 8, rel=0.01)
    assert found.ram_total == pytest.approx(382 * GIB, rel=0.03)
    assert found.devices[0].total - found.devices[0].hot_experts < 14e9
    each = 3 * 7168 * 2048 * (4 + 16 / 128) / 8  # hot experts are int4 whatever the pack has
    assert found.devices[0].hot_experts / found.hot == pytest.approx(each, rel=2e-3)


@pytest.mark.parametrize(("name", "bits"), [("q4_k", 4.5), ("q6_k", 6.5625), ("q8_0", 8.5)])
def test_gguf_blocks_are_sized_by_the_pack_code(name: str, bits: float) -> None:
    """What smaller formats a remedy may name beside them: never another kind of block."""
    from kttools.plan.layout import smaller_cpu_formats
    from kttools_runtime import _kernels

    size = _kernels.expert_bytes(name, 7168, 2048)
    assert size == pytest.approx(3 * 7168 * 2048 * bits / 8, rel=0.01)
    below = smaller_cpu_formats(name)
    assert "int4_g128" in below
    assert not set(below) & set(_kernels.BLOCK_FORMATS)
    assert all(_kernels.expert_bytes(other, 7168, 2048) < size for other in below)


@V3
def test_hot_experts_fill_what_is_free(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (str(directory), "--cpu-format", "int4", "--vram", "24G", "--vram-bandwidth", "1000")
    without, _ = plan(capsys, *line)
    found, _ = plan(capsys, *line, "--gpu-experts", "auto")
    hot = found["gpu_experts"]
    assert hot["per_layer"] == hot["most_per_layer"] == without["gpu_experts"]["most_per_layer"] > 4
    device = found["devices"][0]
    left = device["limit_bytes"] - device["total_bytes"]
    count = round(device["hot_expert_bytes"] / (3 * 7168 * 2048 * 4.25 / 8))
    assert hot["per_layer"] == pytest.approx(count / 58, rel=0.005)
    assert 0 <= left < device["hot_expert_bytes"] / count
    gain = found["upper_bounds"]["decode_tokens_s"] / without["upper_bounds"]["decode_tokens_s"]
    assert 1 < gain < 256 / (256 - hot["per_layer"])
    assert hot["most_decode_tokens_s"] == found["upper_bounds"]["decode_tokens_s"]
    assert "--gpu-experts auto" in found["commands"][-1]
    number, _ = plan(capsys, *line, "--gpu-experts", str(int(hot["per_layer"])))
    assert number["devices"][0]["total_bytes"] <= device["total_bytes"]
    assert "--gpu-experts" not in without["commands"][-1]


@V3
@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        (("--vram", "24G", "--gpu-experts", "30"), ["--gpu-experts"]),
        (("--vram", "13000M"), ["--cache_lens"]),
        (("--vram", "16G", "--gpu-format", "int8"), ["--gpu-format"]),
        (("--vram", "8G", "--cache_lens", "4096"), ["--gpus", "--vram"]),
    ],
)
def test_the_nearest_plan_on_gpus_fits(
    directory: Path, capsys: pytest.CaptureFixture[str], line: tuple[str, ...], remedy: list[str]
) -> None:
    document, err = plan(capsys, str(directory), *line, code=4)
    assert not document["fits"]
    assert "not enough VRAM on cuda:0" in err
    options = shlex.split(err.partition("nearest plan that fits: ")[2].partition(" (")[0])
    given = dict(zip(line[::2], line[1::2], strict=True))
    nearest = dict(zip(options[::2], options[1::2], strict=True))
    changed = [name for name in remedy if nearest[name] != given.get(name)]
    assert changed, err
    merged = {**given, **nearest}
    assert plan(capsys, str(directory), *[text for pair in merged.items() for text in pair])[0]["fits"]


@V3
def test_options_that_contradict(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, code, message in (
        (("--gpu-experts", "auto"), 2, "needs a GPU"),
        (("--vram", "24G", "--gpu-experts", "many"), 2, "expected auto, a number"),
        (("--vram", "24G", "--gpu-experts", "257"), 2, "257 of 256 experts"),
        (("--device", "cuda:0", "--vram", "24G"), 2, "leave one out"),
        (("--device", "tpu"), 2, "expected cpu, cuda:0"),
        (("--device", "cuda:99"), 5, "describe one"),
    ):
        assert cli.main(["plan", str(directory), *line, *MACHINE]) == code
        assert message in capsys.readouterr().err


@V3
def test_the_text_says_where_each_byte_goes(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(directory), "--vram", "24G", *MACHINE]) == 0
    out = capsys.readouterr().out
    for word in ("NUMA shard", "node 1", "cuda:0", "workspace", "allowance", "assumed", "--device cuda:0"):
        assert word in out
