"""The check before every load: sizes as the kernels have them, refusals with a remedy, cheap, said first."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

import kttools_runtime as kt
from kttools import cli
from kttools_runtime import _kernels, footprint, load_plan, memory, numa
from kttools_runtime.device_footprint import device_footprints
from kttools_runtime.errors import ResourceError
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.footprint import StoredTensor, packed_bytes
from kttools_runtime.load_plan import LoadPlan


def plan_of(bundle: Path, **options: object) -> LoadPlan:
    found: list[LoadPlan] = []
    kt.load(bundle, threads=1, on_plan=found.append, **options)  # type: ignore[arg-type]
    return found[0]


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (33, 65), (1, 1), (256, 200), (100, 4096)])
def test_packed_sizes_are_those_of_the_kernels(rows: int, columns: int) -> None:
    engine = ExpertEngine(1).native
    scale = np.ones(rows, np.float32)
    matrices = {
        "bf16": _kernels.PackedLinear.from_bf16(engine, np.zeros((rows, columns), np.uint16)),
        "int8": _kernels.PackedLinear.from_int8(engine, np.zeros((rows, columns), np.int8), scale),
    }
    for name, matrix in matrices.items():
        stored = StoredTensor("x.weight", (rows, columns), name, 0)
        assert packed_bytes(stored) == matrix.nbytes, name
    for group in (32, 64, 128):
        groups = -(-columns // group)
        parts = (np.zeros((rows, groups * group // 2), np.uint8), *(np.ones((rows, groups), np.uint8),) * 2)
        packed = _kernels.PackedLinear.from_int4(engine, *parts, scale, columns, group)
        size = sum(part.nbytes for part in (*parts, scale))
        stored = StoredTensor("x.weight", (rows, groups * group), "int4", size)
        assert packed_bytes(stored) == packed.nbytes, group


def test_too_little_ram_is_refused_before_weights_are_read(
    nano_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(nano_bundle, cache_len=65536)
    monkeypatch.setattr(memory, "available_bytes", lambda: plan.ram.total - 1)
    monkeypatch.setattr("kttools_runtime.loader._load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ResourceError, match=r"nearest plan that fits: --cache_lens 32768 \(") as error:
        kt.load(nano_bundle, threads=1, cache_len=65536)
    assert error.value.exit_code == 4
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)
    with pytest.raises(ResourceError, match="nothing smaller fits"):
        kt.load(nano_bundle, threads=1)


def test_copies_per_node_are_given_up_first(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = plan_of(nano_bundle, cache_len=65536).request
    copied = load_plan.replace(request, numa="replicate", nodes=2, threads=2)
    free = copied.host().total - 1
    with pytest.raises(ResourceError, match=r"nearest plan that fits: --numa shard \("):
        load_plan.make_load_plan(copied, free).check()


def test_vram_is_checked_too(nano_bundle: Path) -> None:
    request = load_plan.replace(plan_of(nano_bundle).request, devices=(0,), cache_len=65536)
    needed = request.on_devices()[0].total
    load_plan.make_load_plan(request, 1 << 40, (needed,)).check()
    with pytest.raises(ResourceError, match=r"cuda:0 .* GiB; nearest plan that fits: --cache_lens 32768"):
        load_plan.make_load_plan(request, 1 << 40, (needed - 1,)).check()


def test_too_many_hot_experts_are_too_much_vram(nano_bundle: Path) -> None:
    request = load_plan.replace(plan_of(nano_bundle).request, devices=(0,), expert_bytes=50_000)
    rest = request.on_devices()[0].total
    layers = request.config.moe_layers
    asked = load_plan.replace(request, hot_experts=tuple((layer, 20) for layer in layers))
    assert asked.on_devices()[0].total == rest + 3 * 20 * 50_000
    free = rest + 3 * 7 * 50_000 + 10
    with pytest.raises(ResourceError, match=r"nearest plan that fits: --gpu-experts 7 \("):
        load_plan.make_load_plan(asked, 1 << 40, (free,)).check()
    fewer = load_plan.replace(request, hot_experts=tuple((layer, 7) for layer in layers))
    load_plan.make_load_plan(fewer, 1 << 40, (free,)).check()
    listed = load_plan.replace(request, hot_experts=((layers[0], 22),))
    with pytest.raises(ResourceError, match=r"nearest plan that fits: --gpu-experts 7 \("):
        load_plan.make_load_plan(listed, 1 << 40, (free,)).check()


def test_it_can_be_overruled(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)
    assert kt.load(nano_bundle, threads=1, check_memory=False).threads == 1


@pytest.mark.parametrize("command", ["chat", "eval", "bench model"])
def test_every_command_that_loads_refuses(
    command: str,
    nano_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some words to predict"}\n')
    arguments = {
        "chat": ["-p", "x", "-n", "1"],
        "eval": ["--data", f"jsonl:{text}#text"],
        "bench model": ["-p", "8", "-n", "1", "-r", "1"],
    }[command]
    line = [*command.split(), str(nano_bundle), *arguments, "-t", "1", "--quiet"]
    assert cli.main(line) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kttools: error: not enough memory: RAM ")
    assert len(captured.err.splitlines()) == 1
    assert cli.main([*line, "--overcommit"]) == 0


def test_the_check_costs_milliseconds_and_reads_everything_once(
    nano_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's nodes are read by the engine alone, bundle.json by the loader alone."""
    from kttools_runtime import manifest

    monkeypatch.setattr(numa._kernels, "numa_nodes", lambda: pytest.fail("the nodes were read again"))
    reads: list[Path] = []
    read = manifest.strict_json.read_bounded

    def counted(file: Path, limit: int) -> bytes:
        reads.append(file)
        return read(file, limit)

    monkeypatch.setattr(manifest.strict_json, "read_bounded", counted)
    request = plan_of(nano_bundle).request
    assert [file.name for file in reads].count("bundle.json") == 1
    fastest = 1.0
    for _ in range(5):
        started = time.perf_counter()
        load_plan.make_load_plan(request).check()
        fastest = min(fastest, time.perf_counter() - started)
    assert fastest < 0.02


def test_streamed_layers_take_one_layer(nano_bundle: Path) -> None:
    whole, streamed = (
        plan_of(nano_bundle).ram,
        plan_of(nano_bundle, stream_layers=True, expert_table="none").ram,
    )
    assert streamed.experts == whole.experts // 3
    assert streamed.dense < whole.dense


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_layers_are_spread_in_order_and_evenly(count: int, nano_bundle: Path) -> None:
    request = plan_of(nano_bundle).request
    found = device_footprints(request.config, request.tensors, 4096, count)
    assert [d.layers[0] for d in found] == [0, *(d.layers[1] for d in found[:-1])]
    assert found[-1].layers[1] == request.config.num_hidden_layers
    assert all(first < last for first, last in (d.layers for d in found))
    weights = sum(d.weight_bytes for d in found)
    assert weights == device_footprints(request.config, request.tensors, 4096)[0].weight_bytes


def test_float32_holds_four_bytes(nano_bundle_bf16: Path) -> None:
    request = plan_of(nano_bundle_bf16, dtype="float32").request
    linear = next(t for t in request.tensors if t.name.endswith("o_proj.weight"))
    assert footprint.held_bytes(linear, request.config, torch.float32) == 4 * linear.elements
    assert request.host().cache == request.cache_len * 4 * (64 + 32) * 4
