"""Upper bounds against the same arithmetic by hand."""

import json
from pathlib import Path

import pytest

from kttools.bench.roofline import Ceilings
from kttools.plan.choice import Choice, open_subject
from kttools.plan.speed import Speed, speed
from tests.plan.released_v3 import DEEPSEEK_V3

EXPERT_WEIGHTS = 3 * 7168 * 2048


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("v3")
    (path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    return path


def bounds(directory: Path, bandwidth: float, compute: float, cache_len: int = 32768) -> Speed:
    layout = open_subject(directory).layout(Choice("int8", "int8", cache_len, "off", 1))
    return speed(layout, cache_len, Ceilings(0.0, bandwidth, compute))


def test_decode_reads_chosen_experts_dense_weights_and_cache(directory: Path) -> None:
    """37.6 B active weights of one byte each; kv_b (1.02 B) takes two."""
    found = bounds(directory, 100e9, 1e18)
    active = 37.55e9 - 129280 * 7168  # as stated with the embedding
    assert found.decode_bytes == pytest.approx(active + 61 * 128 * 256 * 512, rel=0.01)
    assert found.decode_tokens_s == pytest.approx(100e9 / found.decode_bytes)
    full = found.decode_bytes + 32768 * 61 * 576 * 2
    assert found.full_cache_tokens_s == pytest.approx(100e9 / full)


def test_prefill_multiplies_active_weights(directory: Path) -> None:
    found = bounds(directory, 1e18, 50e12)
    active = 37.55e9 - 2 * 129280 * 7168  # without embedding and head
    assert found.token_ops == pytest.approx(2 * active, rel=0.005)
    assert found.prefill_tokens_s == pytest.approx(50e12 / found.token_ops)


def test_a_slow_memory_bounds_prefill_by_one_read_per_chunk(directory: Path) -> None:
    found = bounds(directory, 1e9, 1e18)
    assert found.chunk_bytes >= 58 * 256 * EXPERT_WEIGHTS
    assert found.prefill_tokens_s == pytest.approx(1024 * 1e9 / (found.chunk_bytes + found.dense_bytes))
    assert bounds(directory, 1e9, 1e18, cache_len=1).chunk_bytes < found.chunk_bytes / 10


def test_on_a_gpu_the_slower_half_of_a_layer_counts(directory: Path) -> None:
    """Attention alone, then 464 routed experts over 250 GB/s or what is beside them over 1000 GB/s; with half
    of the experts in VRAM, in int4 there (4 bits and 2 bytes for 128), half of them is read from RAM."""
    layout = open_subject(directory).layout(Choice("int8", "int8", 4096, "off", 1))
    cpu, gpu = Ceilings(0.0, 250e9, 1e18), Ceilings(0.0, 1000e9, 1e18)
    found = speed(layout, 4096, cpu, gpu)
    shared = 58 * EXPERT_WEIGHTS
    alone = found.dense_bytes - shared
    assert found.shared_bytes == pytest.approx(shared, rel=2e-3)
    expected = alone / 1000e9 + 58 * 8 * EXPERT_WEIGHTS / 250e9
    assert 1 / found.decode_tokens_s == pytest.approx(expected, rel=2e-3)
    half = speed(layout, 4096, cpu, gpu, hot_share=0.5)
    expected = alone / 1000e9 + 58 * 4 * EXPERT_WEIGHTS / 250e9
    assert 1 / half.decode_tokens_s == pytest.approx(expected, rel=2e-3)
    everything = speed(layout, 4096, cpu, gpu, hot_share=1.0)
    int4 = 58 * 8 * EXPERT_WEIGHTS * (4 + 16 / 128) / 8
    expected = (alone + shared + int4) / 1000e9
    assert 1 / everything.decode_tokens_s == pytest.approx(expected, rel=2e-3)
