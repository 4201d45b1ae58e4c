"""Hot experts in int4 on the device, whatever the pack has; and as many as the device's memory takes."""

import ctypes
import json
import mmap
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kttools_runtime as kt
from kttools_runtime import _kernels
from kttools_runtime.device_footprint import device_footprints
from kttools_runtime.errors import ResourceError, UsageError
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.footprint import stored_tensors
from kttools_runtime.hybrid.choose import most_used
from kttools_runtime.hybrid.hot import HotExperts
from kttools_runtime.hybrid.hot_codes import FORMAT, hot_codes, hot_expert_bytes, hot_format
from kttools_runtime.hybrid.hot_request import HotRequest
from kttools_runtime.hybrid.untile import PackFile
from kttools_runtime.manifest import load_manifest
from kttools_runtime.moe import RoutedExperts
from kttools_runtime.pack import read_pack_header
from kttools_runtime.pack_writer import PackWriter
from kttools_runtime.shards import ShardWeights
from kttools_runtime.weights import PARTS
from tests.compare import assert_close, mean_kl
from tests.quantize.test_blocks import random_blocks

CPU = torch.device("cpu")
HIDDEN, INNER = 256, 288
PAGE = 4096


def q4_k_blob() -> np.ndarray:
    blob = np.empty(_kernels.expert_bytes("q4_k", HIDDEN, 256), dtype=np.uint8)
    parts = (random_blocks("Q4_K", 256, 256, seed).reshape(-1) for seed in range(3))
    _kernels.pack_ggml_expert("q4_k", HIDDEN, 256, *parts, blob)
    return blob


def pack_of(path: Path, names: list[str]) -> PackFile:
    """A pack of random experts of these formats."""
    generator, blobs = np.random.default_rng(len(names)), []
    inner = 256 if "q4_k" in names else INNER
    for name in names:
        if name == "q4_k":
            blobs.append(q4_k_blob())
            continue
        shapes = ((inner, HIDDEN), (inner, HIDDEN), (HIDDEN, inner))
        blob = np.empty(_kernels.expert_bytes(name, HIDDEN, inner), dtype=np.uint8)
        _kernels.pack_expert(name, *(generator.standard_normal(s, dtype=np.float32) for s in shapes), blob)
        blobs.append(blob)
    with PackWriter(path, layer=0, hidden_size=HIDDEN, moe_intermediate_size=inner, formats=names) as writer:
        for expert, blob in enumerate(blobs):
            writer.write(expert, blob)
    return PackFile(path)


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (["bf16"], FORMAT),
        (["int8"], FORMAT),
        (["q4_k"], FORMAT),
        (["int4_g32"], None),
        (["int8", "int4_g128", "q4_k"], FORMAT),
        (["int4_g64", "int4_g32"], FORMAT),
    ],
)
def test_codes_of_every_pack(tmp_path: Path, names: list[str], form: str | None) -> None:
    """int4 as quantize makes a shard's of the pack's numbers; an int4 pack's own, bit for bit."""
    pack = pack_of(tmp_path / "p.ktpack", names)
    assert hot_format(pack.names, True) == form
    made = hot_codes(pack, range(len(names)), CPU, True, threads=2)
    for expert, codes in enumerate(made):
        kept = form in (None, names[expert])
        own = pack.codes(expert, CPU)
        for matrix, weight, original in zip(
            (codes.gate_up, codes.down), pack.matrices(expert), (own.gate_up, own.down), strict=True
        ):
            assert (matrix.format, matrix.in_features) == ("int4", weight.shape[1])
            wanted = dict(zip(PARTS["int4"], _kernels.quantize_int4(weight.numpy(), 128), strict=True))
            for part, values in original.parts.items() if kept else wanted.items():
                assert torch.equal(matrix.parts[part], torch.as_tensor(values)), part
        assert codes.nbytes == hot_expert_bytes([pack.names], *pack.shape)
    as_is = hot_codes(pack, [0], CPU, False)[0]
    assert torch.equal(as_is.down.dequantized(), pack.codes(0, CPU).down.dequantized())


class WithHot:
    """A layer's experts, some of them multiplied out in torch from given matrices."""

    def __init__(self, layer: Any, hot: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.layer, self.hot = layer, hot

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        is_hot = torch.isin(ids, torch.tensor(list(self.hot)))
        out = self.layer.forward(x, ids.masked_fill(is_hot, -1), weights)
        for row, column in is_hot.nonzero().tolist():
            gate_up, down = self.hot[int(ids[row, column])]
            gate, up = (gate_up @ x[row].float()).chunk(2)
            out[row] += weights[row, column] * (down @ (torch.nn.functional.silu(gate) * up))
        return out


@pytest.mark.parametrize("device", ["cpu:0", "cpu:0,cpu:1"])
def test_logits_of_a_plain_path_with_the_same_numbers(
    nano_bundle_bf16: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 throughout, prompts and captured steps: only the order of sums differs."""
    monkeypatch.setenv("KTTOOLS_DEVICE_EXPERTS", "int4")
    options: dict[str, Any] = {"dtype": "float32", "threads": 1}
    tokens = list(range(3, 27))
    plain: Any = kt.load(nano_bundle_bf16, **options)
    before = plain.logits(tokens)
    model: Any = kt.load(nano_bundle_bf16, **options, device=device, gpu_experts="12", prefill="cpu")
    manifest = load_manifest(nano_bundle_bf16)
    for index in plain.config.moe_layers:
        pack = PackFile(manifest.expert_path(index))
        codes = hot_codes(pack, range(12), CPU, True)
        dense = {e: (c.gate_up.dequantized(), c.down.dequantized()) for e, c in enumerate(codes)}
        mlp = plain.layers[index].mlp
        mlp.experts = RoutedExperts(WithHot(mlp.experts.layer, dense), torch.float32)
    expected = plain.logits(tokens)
    assert float((expected - before).abs().max()) > 0.01  # int4 is another number
    assert_close(model.logits(tokens), expected, 1e-4)
    cache = model.new_cache(len(tokens))
    rows = torch.stack([model.decode(token, cache) for token in tokens])
    assert_close(rows, expected, 1e-4)


def test_int8_to_int4_costs_what_is_stated(nano_bundle: Path) -> None:
    """Every expert requantised: the KL that docs/hybrid.md states, as a bound; half of them costs less."""
    tokens = torch.randint(0, 300, (200,), generator=torch.Generator().manual_seed(1))
    plain = kt.load(nano_bundle, threads=1).logits(tokens)
    kls = [
        mean_kl(
            kt.load(nano_bundle, device="cpu:0", threads=1, gpu_experts=n, prefill="cpu").logits(tokens),
            plain,
        )
        for n in ("32", "8")
    ]
    assert kls[1] < kls[0] < 0.02


def test_unknown_codes_are_refused(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTTOOLS_DEVICE_EXPERTS", "int3")
    with pytest.raises(UsageError, match="KTTOOLS_DEVICE_EXPERTS must be one of auto, int4, pack"):
        kt.load(nano_bundle, device="cpu:0", threads=1, gpu_experts="1")


def footprints(bundle: Path, devices: int) -> Any:
    manifest = load_manifest(bundle)
    files = [manifest.path(name) for name in manifest.files if name.endswith(".safetensors")]
    tensors = stored_tensors(ShardWeights(files, manifest.linears).infos, manifest.linears)
    expert = PackFile(manifest.expert_path(1)).header.file_bytes // 32
    return device_footprints(manifest.model, tensors, 64, devices, expert_bytes=expert)


def profile(folder: Path, counts: np.ndarray) -> Path:
    from kttools.profiling.profile_file import Profile, write_profile

    header = {"format": "kttools-expert-profile", "version": 1}
    write_profile(folder, Profile(header, {"a": {"count": counts}}, {}))
    return folder / "profile.expert-profile.json"


@pytest.mark.parametrize("devices", [1, 2])
def test_auto_fills_the_budget(
    nano_bundle: Path, devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By counts until one more would not fit, on each device; evenly without counts; plan says the same."""
    from kttools.plan.choice import Choice, needs_of, open_subject
    from kttools.plan.memory import Machine

    owns = footprints(nano_bundle, devices)
    manifest = load_manifest(nano_bundle)
    config = manifest.model
    each = hot_expert_bytes([["int8"]], config.hidden_size, config.moe_intermediate_size)
    budget = -(-(max(own.total for own in owns) + 41 * each + each // 2) // 1024) * 1024
    monkeypatch.setenv("KTTOOLS_SIMULATED_VRAM", f"{budget >> 10}K")
    counts = np.random.default_rng(2).integers(1, 1000, (3, config.n_routed_experts)).astype(float)
    file = profile(tmp_path, counts)
    names = ",".join(f"cpu:{index}" for index in range(devices))
    options: dict[str, Any] = {"device": names, "threads": 1, "cache_len": 64}
    model: Any = kt.load(nano_bundle, **options, gpu_experts=f"auto:{file}")
    even: Any = kt.load(nano_bundle, **options, gpu_experts="auto")
    total = 0
    for own in owns:
        layers = [i for i in config.moe_layers if own.layers[0] <= i < own.layers[1]]
        room = min((budget - own.total) // each, 32 * len(layers))
        held = {i: model.mixtures[i].hot.experts if model.mixtures[i].hot else () for i in layers}
        assert sum(map(len, held.values())) == room
        share = {i: torch.from_numpy(counts[p]) for p, i in enumerate(config.moe_layers)}
        assert held == {i: tuple(ids) for i, ids in most_used(share, layers, 32, room).items()}
        least = min(counts[config.moe_layers.index(i)][e] / counts[config.moe_layers.index(i)].sum()
                    for i, ids in held.items() for e in ids)  # fmt: skip
        left = [counts[config.moe_layers.index(i)][e] / counts[config.moe_layers.index(i)].sum()
                for i, ids in held.items() for e in range(32) if e not in ids]  # fmt: skip
        assert not left or max(left) <= least
        lengths = [len(even.mixtures[i].hot.experts) for i in layers]
        assert sum(lengths) == room
        assert max(lengths) - min(lengths) <= 1
        total += room
    subject = open_subject(nano_bundle)
    choice = Choice(None, None, 64, "off", 1, HotRequest(None, {}))
    need = needs_of(subject, choice, Machine(1 << 40, (budget,) * devices, 1))
    assert (need.hot, need.most_hot) == (total, total)
    assert all(
        budget - each < own.total <= budget or own.hot_experts % (32 * each) == 0 for own in need.devices
    )
    measured = sum(mixture.hot.nbytes - mixture.hot.slot_of.nbytes for mixture in model.mixtures.values())
    assert measured == sum(own.hot_experts for own in need.devices)


def test_a_budget_that_is_too_small_or_no_size(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"device": "cpu:0", "threads": 1, "gpu_experts": "auto"}
    monkeypatch.setenv("KTTOOLS_SIMULATED_VRAM", "10M")
    with pytest.raises(ResourceError, match="no device memory is left for experts"):
        kt.load(nano_bundle, **options)
    monkeypatch.setenv("KTTOOLS_SIMULATED_VRAM", "lots")
    with pytest.raises(UsageError, match="KTTOOLS_SIMULATED_VRAM must be a size such as 24G"):
        kt.load(nano_bundle, **options)


def resident(path: Path) -> list[bool]:
    """Which pages of a file are in the page cache (mincore)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        pages = (ctypes.c_ubyte * -(-len(mapped) // PAGE))()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped)), pages) == 0
        del view
        return [bool(page & 1) for page in pages]


def read_ahead_bytes() -> int:
    """The most that the kernel reads around a page that is asked for."""
    sizes = [int(f.read_text()) << 10 for f in Path("/sys/block").glob("*/queue/read_ahead_kb")]
    return max(sizes, default=128 << 10)


def test_no_page_of_a_hot_expert_is_read_in(tmp_path: Path) -> None:
    """mincore, 12 experts of 3 MB: the ten on the device were read once and are in no memory, but for what
    the kernel reads around the two that the CPU computes."""
    hidden, names = 1024, ["int8"] * 12
    blob = np.empty(_kernels.expert_bytes("int8", hidden, hidden), dtype=np.uint8)
    weight = np.random.default_rng(0).standard_normal((hidden, hidden), dtype=np.float32)
    _kernels.pack_expert("int8", weight, weight, weight, blob)
    path = tmp_path / "p.ktpack"
    with PackWriter(path, layer=0, hidden_size=hidden, moe_intermediate_size=hidden, formats=names) as writer:
        for expert in range(12):
            writer.write(expert, blob)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sum(resident(path)):
        pytest.skip("this file system does not drop pages on request")
    margin = read_ahead_bytes()
    if margin > 5 * len(blob):
        pytest.skip(f"the kernel reads {margin} bytes around a page")
    pack = PackFile(path)
    hot = HotExperts(dict(enumerate(hot_codes(pack, range(10), CPU, True))), 12, CPU, torch.bfloat16)
    layer = ExpertEngine(1).layer_from_pack(path)
    ids = torch.tensor([[3, 10, 7], [0, 11, 9]])
    out = layer.forward(torch.ones(2, hidden), hot.without(ids), torch.ones(2, 3))
    assert float(out.abs().max()) > 0
    experts, pages = pack.header.experts, resident(path)
    for expert in experts[10:]:
        assert all(pages[expert.offset // PAGE : (expert.offset + expert.bytes) // PAGE])
    untouched = pages[experts[0].offset // PAGE + 32 : (experts[10].offset - margin) // PAGE]
    assert len(untouched) > 1000
    assert sum(untouched) < 0.02 * len(untouched)  # folios that reach over from a neighbour
    layer.forward(torch.ones(1, hidden), torch.tensor([[3]]), torch.ones(1, 1))  # and the test can see
    assert all(resident(path)[experts[3].offset // PAGE :][: len(blob) // PAGE])


def mapped_pages(path: Path) -> set[int]:
    """Pages of a file that this process has in its address space (/proc/self/pagemap)."""
    found: set[int] = set()
    maps = re.findall(
        rf"^(\w+)-(\w+) \S+ (\w+) .*{re.escape(str(path))}$", Path("/proc/self/maps").read_text(), re.M
    )
    with Path("/proc/self/pagemap").open("rb") as file:
        for begin, end, offset in ([int(text, 16) for text in row] for row in maps):
            file.seek(begin // PAGE * 8)
            entries = np.frombuffer(file.read((end - begin) // PAGE * 8), dtype=np.uint64)
            found |= {offset // PAGE + int(i) for i in np.flatnonzero(entries >> np.uint64(63))}
    return found


def test_a_model_maps_no_page_of_its_hot_experts(nano_bundle: Path, tmp_path: Path) -> None:
    """After load, prompts and steps this process has mapped pages of the CPU's experts alone; 16 pages before
    them may come with a fault (fault-around)."""
    manifest = load_manifest(nano_bundle)
    layers = manifest.model.moe_layers
    hot = {"format": "kttools-gpu-experts", "layers": {str(i): list(range(24)) for i in layers}}
    (tmp_path / "hot.json").write_text(json.dumps(hot))
    model: Any = kt.load(
        nano_bundle, device="cpu:0", threads=1, gpu_experts=str(tmp_path / "hot.json"), prefill="cpu"
    )
    cache = model.new_cache(80)
    model.prefill([i * 7919 % 300 for i in range(64)], cache)
    for token in range(8):
        model.decode(token, cache)
    for layer in layers:
        path = manifest.expert_path(layer)
        experts, pages = read_pack_header(path).experts, mapped_pages(path)
        first = experts[24].offset // PAGE
        assert len([page for page in pages if page >= first]) > 16
        assert not [page for page in pages if experts[0].offset // PAGE + 16 <= page < first - 16]
