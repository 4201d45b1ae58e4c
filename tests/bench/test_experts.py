"""bench experts on a tiny layer: rows, fields, ids, output styles, and peers that are missing or present."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from kttools.bench import experts, report
from kttools.bench.accuracy import problem, relative_l2
from kttools.bench.kt_peer import KtKernelPeer, available
from kttools.bench.layer import random_layer
from kttools.bench.shapes import LayerShape
from kttools.cli import main
from kttools_runtime import _kernels
from kttools_runtime.errors import UsageError
from kttools_runtime.experts import ExpertEngine

TINY = LayerShape("tiny", 128, 64, 6, 3)
LLAMA_BENCH_FIELDS = {
    "build_commit", "build_number", "cpu_info", "model_filename", "model_type", "model_size",
    "model_n_params", "n_threads", "n_prompt", "n_gen", "test_time", "avg_ns", "stddev_ns", "avg_ts",
    "stddev_ts", "samples_ns", "samples_ts",
}  # fmt: skip
OUR_FIELDS = {
    "test", "engine", "format", "isa", "num_experts", "top_k", "experts_hit", "median_ms", "median_ts",
    "tops", "gb_s", "floor_ms", "roofline_fraction", "ceiling_gb_s", "ceiling_tops", "ratio",
    "huge_page_share", "relative_error", "scratch_mib",
}  # fmt: skip
SIZES = ["--shape", "128x64", "--experts", "6", "--top-k", "3"]
COMMAND = ["bench", "experts", *SIZES, "--tokens", "1,5", "-r", "2", "-t", "1"]


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one is 2 GiB, so that no cache holds it."""
    monkeypatch.setattr(experts, "LEAST_PROBE_BYTES", 1 << 20)


def test_ids_are_distinct_in_range_and_fresh() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = experts.random_ids(generator, 500, TINY)
    assert ids.shape == (500, 3)
    assert ids.dtype == torch.int64
    assert int(ids.min()) == 0
    assert int(ids.max()) == 5
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert not torch.equal(ids, experts.random_ids(generator, 500, TINY))


def test_random_layer_computes_like_a_layer_of_its_weights() -> None:
    engine = ExpertEngine(1)
    made = random_layer(engine, TINY, "int8")
    assert made.memory.nbytes == 6 * made.expert_bytes
    size = made.expert_bytes
    blobs = [made.memory[e * size : (e + 1) * size] for e in range(6)]
    assert all((blob == blobs[0]).all() for blob in blobs[1:])
    gate, up, down = (torch.from_numpy(w) for w in _kernels.unpack_expert("int8", blobs[3], 128, 64))
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(3))
    got = made.layer.forward(x, torch.full((4, 1), 3), torch.ones(4, 1))
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert relative_l2(got, expected) < 0.05


def test_run_makes_a_row_per_token_count() -> None:
    seen: list[str] = []
    plan = experts.Plan(TINY, "int8", (1, 7), repeat=3)
    rows = experts.run(ExpertEngine(1), plan, notice=seen.append)
    assert [(row.engine, row.num_tokens, len(row.calls)) for row in rows] == [
        ("kttools", 1, 3),
        ("kttools", 7, 3),
    ]
    assert all(call.experts_hit == 3 for call in rows[0].calls)
    assert all(row.roofline_fraction > 0 and row.ratio is None for row in rows)
    assert seen[-1] == "7 tokens"


def test_json_has_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "-o", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["n_prompt"] for record in records] == [1, 5]
    for record in records:
        assert record.keys() >= LLAMA_BENCH_FIELDS | OUR_FIELDS
        assert len(record["samples_ns"]) == 2
        assert record["n_threads"] == 1
        assert record["median_ts"] == pytest.approx(record["n_prompt"] / record["median_ms"] * 1e3)
        assert 0 < record["relative_error"] < 0.1


def test_markdown_and_csv(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--no-accuracy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(" | ")[-3:] == ["ceiling TOPS", "peer / ours", "scratch MiB |"]
    assert float(lines[2].split(" | ")[-1].rstrip(" |")) > 1
    assert lines[2].startswith("| kttools | 1 |")
    assert any("copies of one random expert" in line for line in lines)
    assert main([*COMMAND, "--no-accuracy", "-o", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows[1]["n_prompt"] == "5"
    assert rows[1]["relative_error"] == ""
    assert len(rows[1]["samples_ns"].split()) == 2


@pytest.mark.parametrize("format", ["int4", "bf16"])
def test_other_formats_run(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--format", format, "--no-accuracy", "-o", "json"]) == 0
    assert [record["format"] for record in json.loads(capsys.readouterr().out)] == [format] * 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--format", "int5"], 2, "unknown expert format 'int5'"),
        (["--tokens", "0"], 2, "whole numbers of at least 1"),
        (["--tokens", "1,x"], 2, "whole numbers of at least 1"),
        (["--peer-python", "python"], 2, "--peer-python needs --peer"),
        (["--isa", "sse9"], 5, "unknown isa 'sse9'"),
    ],
)
def test_bad_options(options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, *options]) == code
    assert message in capsys.readouterr().err


def test_a_missing_peer_is_named() -> None:
    with pytest.raises(UsageError, match="kt_kernel is not installed in /nowhere/python"):
        KtKernelPeer("/nowhere/python")
    assert not available("/nowhere/python")


FAKE_KT_KERNEL = '''
"""Adds every token's id sum to its first feature: enough to see what arrives."""
import ctypes
__version__, __cpu_variant__ = "0.0", "fake"
print("noise on stdout")

class WorkerPoolConfig: pass

class CPUInfer:
    def __init__(self, config): self.backend_ = config
    def submit(self, task): task()
    def sync(self): pass

class MOEConfig:
    def __init__(self, *sizes): self.sizes = sizes

class AMXInt8_MOE:
    def __init__(self, config):
        assert config.max_len % 64 == 0 and config.gate_proj and config.physical_to_logical_map
        self.hidden = config.sizes[2]
    def load_weights_task(self, pointer): return lambda: None
    def forward_task(self, count, k, ids, weights, x, out, incremental):
        def run():
            for token in range(ctypes.c_int32.from_address(count).value):
                row = (ctypes.c_int64 * k).from_address(ids + 8 * k * token)
                bits = ctypes.c_uint32.from_buffer(ctypes.c_float(sum(row))).value >> 16
                ctypes.c_uint16.from_address(out + 2 * self.hidden * token).value = bits
        return run

class moe:
    MOEConfig, AMXInt8_MOE = MOEConfig, AMXInt8_MOE

class kt_kernel_ext:
    WorkerPoolConfig, CPUInfer, moe = WorkerPoolConfig, CPUInfer, moe
'''


@pytest.fixture
def fake_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kt_kernel that the worker process imports: the pipe is tested where the real one is not installed."""
    (tmp_path / "kt_kernel.py").write_text(FAKE_KT_KERNEL, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("fake_peer")
def test_peer_rows_alternate_and_carry_the_ratio() -> None:
    plan = experts.Plan(TINY, "int8", (2,), repeat=2)
    with KtKernelPeer(sys.executable) as peer:
        rows = experts.run(ExpertEngine(1), plan, peer, notice=str)
        ours, theirs = rows
        assert (theirs.engine, theirs.isa, peer.version) == ("kt-kernel", "fake", "0.0")
        assert ours.ratio == pytest.approx(theirs.median_s / ours.median_s)
        moments = sorted([*ours.calls, *theirs.calls], key=lambda call: call.at)
        assert [call in ours.calls for call in moments] == [True, False, True, False]
        assert report.expert_record(theirs)["model_size"] == 6 * 3 * 128 * 64
        ids = torch.tensor([[0, 1, 2], [5, 4, 3]])
        peer.load(TINY, "int8", 1, 2)
        out = peer.forward(torch.zeros(2, 128, dtype=torch.bfloat16), ids, torch.ones(2, 3))
        assert out[:, 0].tolist() == [3.0, 12.0]


@pytest.mark.usefixtures("fake_peer")
def test_peer_failures_are_reported() -> None:
    with KtKernelPeer(sys.executable) as peer:
        with pytest.raises(UsageError, match="kt-kernel is measured with int8, int4, bf16, got 'int4_g64'"):
            peer.load(TINY, "int4_g64", 1, 2)
        with pytest.raises(Exception, match=r"kt-kernel failed at load: AttributeError.*AMXInt4_MOE"):
            peer.load(TINY, "int4", 1, 2)
        peer.close()
        peer.close()
        with pytest.raises(Exception, match="kt-kernel died at call"):
            peer.call(1)


def test_real_kt_kernel_agrees_with_float32() -> None:
    if not available(None):
        pytest.skip("kt_kernel is not installed in this environment")
    case = problem(LayerShape("small", 512, 256, 4, 4))
    with KtKernelPeer() as peer:
        peer.load(case.shape, "int8", 2, 8, (case.gate, case.up, case.down))
        assert relative_l2(peer.forward(case.x, case.ids, case.weights), case.expected) < 0.1


def test_error_of_our_layer_is_quantisation_only() -> None:
    case = problem(LayerShape("small", 512, 256, 4, 4))
    layer = ExpertEngine(1).layer_from_tensors(case.gate, case.up, case.down, "int8")
    assert relative_l2(layer.forward(case.x, case.ids, case.weights), case.expected) < 0.05
    nan = torch.full_like(case.expected, float("nan"))
    assert not relative_l2(nan, case.expected) < 0.05
