"""Experts on the device: codes out of a pack, hot experts, deferral, streaming, and what they leave alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kttools_runtime as kt
from kttools_runtime import _kernels
from kttools_runtime.attention import Step
from kttools_runtime.device_footprint import workspace_bytes
from kttools_runtime.errors import InvalidInputError, UsageError
from kttools_runtime.footprint import stored_tensors
from kttools_runtime.hybrid import linears, prefill
from kttools_runtime.hybrid.choose import most_used
from kttools_runtime.hybrid.feed import ExpertFeed
from kttools_runtime.hybrid.hot import expanded
from kttools_runtime.hybrid.hot_request import profile_counts
from kttools_runtime.hybrid.mixture import split_late
from kttools_runtime.hybrid.prefill import Calibration
from kttools_runtime.hybrid.untile import PackFile, expert_codes, expert_device_bytes
from kttools_runtime.manifest import load_manifest
from kttools_runtime.pack import read_pack_header
from kttools_runtime.shards import ShardWeights
from tests.compare import assert_close
from tests.memory import PeakBytes

CPU = torch.device("cpu")
TOL = 1e-4


@pytest.mark.parametrize("name", ["bf16", "int8", "int4_g32", "int4_g64", "int4_g128"])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 32), (72, 40), (200, 130), (128, 17)])
def test_codes_are_the_blobs(name: str, hidden: int, inner: int) -> None:
    """Put in order by torch and multiplied out: what the kernels' own unpacking gives, bit for bit."""
    generator = np.random.default_rng(hidden)
    gate, up, down = (
        generator.standard_normal(shape, dtype=np.float32)
        for shape in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    blob = np.empty(_kernels.expert_bytes(name, hidden, inner), dtype=np.uint8)
    _kernels.pack_expert(name, gate, up, down, blob)
    want_gate, want_up, want_down = _kernels.unpack_expert(name, blob, hidden, inner)
    codes = expert_codes(torch.from_numpy(blob), name, hidden, inner, CPU)
    for matrix, wanted in ((codes.gate_up, np.concatenate((want_gate, want_up))), (codes.down, want_down)):
        weight, scale = expanded(matrix, torch.float32)
        got = weight if scale is None else weight * scale[:, None]
        assert torch.equal(got, torch.from_numpy(wanted))
        assert torch.equal(matrix.dequantized().to(torch.float32), torch.from_numpy(wanted))
    assert codes.nbytes == expert_device_bytes(name, hidden, inner)


def test_hot_experts_leave_their_pack_bytes_alone(nano_bundle: Path, tmp_path: Path) -> None:
    """Garbage in the packs of the experts on the device changes nothing; in those of the CPU it does."""
    bundle = tmp_path / "copy"
    shutil.copytree(nano_bundle, bundle)
    model: Any = kt.load(bundle, device="cpu:0", dtype="float32", threads=1, gpu_experts="20", prefill="cpu")
    tokens = torch.arange(3, 40)
    before = model.logits(tokens)
    cache = model.new_cache(8)
    single = model.decode(5, cache)

    def poison(experts: range) -> None:
        for layer in model.config.moe_layers:
            path = load_manifest(bundle).expert_path(layer)
            header = read_pack_header(path)
            with path.open("r+b") as file:
                for expert in experts:
                    file.seek(header.experts[expert].offset)
                    file.write(b"\x55" * header.experts[expert].bytes)

    poison(range(20))
    cache.truncate(0)
    assert torch.equal(model.logits(tokens), before)
    assert torch.equal(model.decode(5, cache), single)
    poison(range(20, 32))
    assert not torch.equal(model.logits(tokens), before)


def test_packs_are_mapped_once_and_clean(nano_bundle: Path) -> None:
    """Clean, shared mappings of the packs after load, prefill and decode: no second copy of a page."""
    model = kt.load(nano_bundle, device="cpu:0,cpu:1", threads=1, prefill="cpu")
    cache = model.new_cache(32)
    model.prefill(range(16), cache)
    for token in range(4):
        model.decode(token, cache)
    maps = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for layer in model.config.moe_layers:
        path = load_manifest(nano_bundle).expert_path(layer)
        own = [entry for entry in maps if str(path) in entry.split("\n")[0]]
        assert len(own) >= 1
        sizes = {key: int(kb) for key, kb in re.findall(r"^(\w+):\s+(\d+) kB", own[-1], re.M)}
        assert sizes["Private_Dirty"] == sizes["Shared_Dirty"] == sizes["Anonymous"] == 0
        assert sizes["Pss"] <= path.stat().st_size // 1024 + 4


def test_lowest_weights_are_late() -> None:
    ids = torch.tensor([[4, 1, 9], [7, -1, 2], [-1, -1, 3]])
    weights = torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.0, 0.3], [0.0, 0.0, 1.0]])
    now, late = split_late(ids, weights, 1)
    assert now.tolist() == [[4, -1, 9], [-1, -1, 2], [-1, -1, -1]]
    assert late.tolist() == [[-1, 1, -1], [7, -1, -1], [-1, -1, 3]]


def deferred_logits(model: Any, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """The definition, token by token choice by choice, from the plain model's parts."""
    step = Step(0, len(tokens), model._rope.rotations(0, len(tokens)))
    cache = model.new_cache(len(tokens))
    hidden = model._embedding[tokens].to(torch.float32)
    arriving = torch.zeros_like(hidden)
    for index, layer in enumerate(model.layers):
        hidden = hidden + layer.attention(layer.attention_norm(hidden), step, cache.layers[index])
        x, next_arriving = layer.mlp_norm(hidden), torch.zeros_like(hidden)
        if index in model.config.moe_layers:
            ids, weights = layer.mlp.router(x)
            late = torch.full_like(ids, -1)
            if index < len(model.layers) - 1:
                for row in range(len(tokens)):
                    for place in sorted(range(ids.shape[1]), key=lambda c: float(weights[row, c]))[:count]:
                        late[row, place], ids[row, place] = ids[row, place].item(), -1
            experts = layer.mlp.experts.layer
            hidden = hidden + experts.forward(x, ids, weights) + layer.mlp.shared(x)
            next_arriving = experts.forward(x, late, weights)
        else:
            hidden = hidden + layer.mlp(x)
        hidden, arriving = hidden + arriving, next_arriving
    return model._head(model._norm(hidden))


@pytest.mark.parametrize("count", [1, 3])
def test_deferral_is_its_definition(nano_bundle_bf16: Path, count: int) -> None:
    tokens = torch.randint(0, 300, (20,), generator=torch.Generator().manual_seed(5))
    plain = kt.load(nano_bundle_bf16, dtype="float32", threads=1)
    with torch.inference_mode():
        expected = deferred_logits(plain, tokens, count)
    for device in ("cpu:0", "cpu,cpu"):
        model: Any = kt.load(
            nano_bundle_bf16, device=device, dtype="float32", threads=1, defer_experts=count, prefill="cpu"
        )
        assert_close(model.logits(tokens), expected, TOL)
        cache = model.new_cache(20)
        rows = torch.stack([model.decode(token, cache) for token in tokens.tolist()])
        assert_close(rows, expected, TOL)
    assert float((plain.logits(tokens) - expected).abs().max()) > 0.01


def test_a_prompt_is_not_deferred(nano_bundle_bf16: Path) -> None:
    plain = kt.load(nano_bundle_bf16, dtype="float32", threads=1)
    model = kt.load(
        nano_bundle_bf16, device="cpu:0", dtype="float32", threads=1, defer_experts=3, prefill="cpu"
    )
    assert_close(model.prefill(range(9), model.new_cache(9)), plain.logits(range(9))[-1], TOL)


def test_the_most_used_are_chosen() -> None:
    counts = {1: torch.tensor([5.0, 1.0, 4.0]), 2: torch.tensor([90.0, 5.0, 5.0])}
    assert most_used(counts, [1, 2], 3, 3) == {1: [0, 2], 2: [0]}
    assert most_used({}, [1, 2], 3, 4) == {1: [0, 1], 2: [0, 1]}
    assert most_used({}, [], 3, 0) == {}


def test_lists_and_profiles(nano_bundle_bf16: Path, tmp_path: Path) -> None:
    """A list of experts; counts of an expert profile over all its domains; files of neither kind."""
    file = tmp_path / "hot.json"
    file.write_text(json.dumps({"format": "kttools-gpu-experts", "layers": {"1": [3, 0], "3": [31]}}))
    model: Any = kt.load(nano_bundle_bf16, device="cpu:0", threads=1, gpu_experts=str(file))
    hot = {index: mixture.hot and mixture.hot.experts for index, mixture in model.mixtures.items()}
    assert hot == {1: (0, 3), 2: None, 3: (31,)}
    bad = [({"0": [1]}, "of a MoE layer"), ({"1": [32]}, "outside 0..31"), ({"9" * 5000: [1]}, "of a MoE")]
    for layers, message in [*bad, ({"01": [1]}, "of a MoE layer"), ({"1": [True]}, "of a MoE layer")]:
        file.write_text(json.dumps({"format": "kttools-gpu-experts", "layers": layers}))
        with pytest.raises(InvalidInputError, match=message):
            kt.load(nano_bundle_bf16, device="cpu:0", threads=1, gpu_experts=str(file))
    file.write_text(json.dumps({"format": "kttools-gpu-experts", "layers": {"1": [0]}}))
    for text in (f"auto:{file}", f"2:{file}"):
        with pytest.raises(UsageError, match="is a list, which says how many: give it alone"):
            kt.load(nano_bundle_bf16, device="cpu:0", threads=1, gpu_experts=text)
    with pytest.raises(UsageError, match="no such file"):
        kt.load(nano_bundle_bf16, device="cpu:0", threads=1, gpu_experts="9" * 5000)
    file.write_text("{}")
    with pytest.raises(InvalidInputError, match="neither an expert profile nor a list"):
        kt.load(nano_bundle_bf16, device="cpu:0", threads=1, gpu_experts=str(file))


def test_profile_counts(nano_bundle_bf16: Path, tmp_path: Path) -> None:
    from kttools.profiling.profile_file import Profile, write_profile

    config = load_manifest(nano_bundle_bf16).model
    shape = len(config.moe_layers), config.n_routed_experts
    count = np.zeros(shape)
    count[:, 7] = 10.0
    header = {"format": "kttools-expert-profile", "version": 1}
    write_profile(tmp_path, Profile(header, {"a": {"count": count}, "b": {"count": count * 2}}, {}))
    file = tmp_path / "profile.expert-profile.json"
    found = profile_counts(json.loads(file.read_text()), file, config)
    assert {layer: float(c[7]) for layer, c in found.items()} == dict.fromkeys(config.moe_layers, 30.0)
    model: Any = kt.load(nano_bundle_bf16, device="cpu:0", threads=1, gpu_experts=f"1:{file}")
    assert [mixture.hot.experts for mixture in model.mixtures.values()] == [(7,)] * 3


def test_the_split_ends_soonest() -> None:
    rows = [100, 60, 10, 1, 1]
    assert Calibration(1.0, 0.0, 1e9, 0.0).device_share(rows) == 0
    assert Calibration(1.0, 1.0, 0.0, 0.0).device_share(rows) == 5
    # The device takes 2 s an expert, the CPU 0.1 s a row: 17.2 s alone; 2 away: 1.2 against 4; 1 away: 7.2.
    assert Calibration(0.0, 0.1, 2.0, 0.0).device_share(rows) == 2


def test_calibration_is_measured_once(
    nano_bundle_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept for the machine; a damaged file is measured again; short prompts do not ask."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs: list[int] = []

    def measured(*_: object) -> Calibration:
        runs.append(1)
        return Calibration(1e-4, 1e-3, 1e-3, 1e-6)

    monkeypatch.setattr(prefill, "measure", measured)
    options: dict[str, Any] = {"device": "cpu:0", "threads": 1, "dtype": "float32"}
    expected = kt.load(nano_bundle_bf16, **options, prefill="gpu").logits(range(64))
    assert not runs
    model = kt.load(nano_bundle_bf16, **options)
    model.prefill(range(8), model.new_cache(8))
    assert not runs
    assert_close(model.logits(range(64)), expected, TOL)
    assert len(runs) == 1
    (file,) = (tmp_path / "kttools").iterdir()
    kt.load(nano_bundle_bf16, **options).logits(range(64))
    assert len(runs) == 1
    for damage in ("{", "[]", '{"cpu_expert_s": 1.0}', file.read_text().replace("0.001", "-1.0")):
        file.write_text(damage)
        assert prefill.read_calibration(file) is None


def test_measure_times_both_sides(nano_bundle: Path) -> None:
    model: Any = kt.load(nano_bundle, device="cpu:0", threads=1)
    layer = model.mixtures[1].layer.experts
    pack = PackFile(load_manifest(nano_bundle).expert_path(1))
    found = prefill.measure(layer, pack, ExpertFeed(CPU), torch.bfloat16)
    assert found.cpu_row_s + found.cpu_expert_s > 0
    assert 0 < found.device_expert_s + found.device_row_s < 10


@pytest.mark.parametrize("policy", ["cpu", "gpu"])
def test_device_memory_of_a_prompt_is_bounded(
    nano_bundle: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of live tensors, cache and weights excluded: about what plan reckons for a chunk of 64, and
    four times the prompt adds no more than masks and keys of its longer context."""
    monkeypatch.setattr(linears, "EXPANDED_BYTES", 1 << 16)
    monkeypatch.setattr(linears, "DENSE_ROWS", 16)
    manifest = load_manifest(nano_bundle)
    files = [manifest.path(name) for name in manifest.files if name.endswith(".safetensors")]
    tensors = stored_tensors(ShardWeights(files, manifest.linears).infos, manifest.linears)
    expert = PackFile(manifest.expert_path(1)).blob_bytes(0)
    model = kt.load(nano_bundle, device="cpu:0", threads=1, prefill=policy)
    peaks = []
    for length in (128, 512):
        cache = model.new_cache(length)
        tokens = [i % 300 for i in range(length)]
        model.prefill(tokens, cache, chunk_size=64)  # tables and host buffers of their full size
        cache.truncate(0)
        with PeakBytes() as peak:
            model.prefill(tokens, cache, chunk_size=64)
        peaks.append(peak.bytes)
        plan = workspace_bytes(manifest.model, tensors, length, torch.bfloat16, 64, expert)
        assert peak.bytes <= 1.15 * plan, length  # an estimate; 1.07 of it here
    assert 0 < peaks[0] <= peaks[1] <= 3 * peaks[0]


def test_the_counter_of_bytes_counts() -> None:
    with PeakBytes() as peak:
        first = torch.zeros(1000)
        second = first.view(10, 100) + 1
        del first
        third = second * 2
        del second, third
        torch.zeros(500)
    assert peak.bytes == 8000
