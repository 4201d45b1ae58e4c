"""The roofline's arithmetic on planted numbers, and the ceilings as measured."""

import numpy as np
import pytest

from kttools.bench.experts import Call, Row
from kttools.bench.roofline import CeilingLog, Ceilings, floor_s, nearest
from kttools.bench.shapes import LayerShape, parse_shape
from kttools_runtime import _kernels
from kttools_runtime.errors import UsageError

SHAPE = LayerShape("planted", 100, 10, 4, 2)  # 3000 weights per expert
CEILINGS = Ceilings(at=10.0, bandwidth_bytes_s=1e6, compute_ops_s=1e7)


def row(*calls: Call, num_tokens: int = 5, ceilings: Ceilings = CEILINGS) -> Row:
    expert_bytes = 3000
    operations = SHAPE.operations(num_tokens)
    floors = tuple(floor_s(ceilings, call.experts_hit * expert_bytes, operations) for call in calls)
    return Row("kttools", "int8", "scalar", 1, SHAPE, num_tokens, expert_bytes, calls, floors, ceilings)


def test_floor_is_the_larger_of_memory_and_compute() -> None:
    assert floor_s(CEILINGS, weight_bytes=2e6, operations=1e7) == 2.0
    assert floor_s(CEILINGS, weight_bytes=2e6, operations=5e7) == 5.0


def test_operations_count_a_multiply_add_twice() -> None:
    assert SHAPE.weights_per_expert == 3000
    assert SHAPE.operations(5) == 2 * 5 * 2 * 3000


def test_fraction_is_the_median_of_floor_over_time() -> None:
    # 60000 operations at 1e7 per second: 6 ms; 3 experts of 3000 bytes at 1e6 per second: 9 ms; 1: 3 ms.
    measured = row(Call(0.0, 0.018, 3), Call(1.0, 0.012, 1), Call(2.0, 0.09, 3))
    assert measured.floors_s == pytest.approx((0.009, 0.006, 0.009))
    assert measured.roofline_fraction == pytest.approx(0.5)
    assert measured.median_s == 0.018
    assert measured.weight_bytes == pytest.approx(3000 * 7 / 3)


def test_nearest_ceiling_in_time() -> None:
    log = [Ceilings(0.0, 1.0, 1.0), Ceilings(10.0, 2.0, 1.0), Ceilings(20.0, 3.0, 1.0)]
    assert [nearest(log, at).bandwidth_bytes_s for at in (-5.0, 4.0, 6.0, 30.0)] == [1.0, 1.0, 2.0, 3.0]


def test_ceilings_of_every_table(isa: str) -> None:
    engine = _kernels.Engine(2, isa)
    memory = np.ones(1 << 20, dtype=np.uint8)
    log = CeilingLog(engine, memory, "int8")
    entry = log.measure()
    assert log.entries == [entry]
    assert 1e8 < entry.bandwidth_bytes_s < 1e13
    assert 1e7 < entry.compute_ops_s < 1e15
    assert 1e7 < _kernels.measure_compute(engine, 0.02, "bf16") < 1e15


def test_more_threads_than_lines_and_fresh_memory() -> None:
    engine = _kernels.Engine(3, "scalar")
    assert _kernels.measure_bandwidth(engine, 1 << 20) > 0
    assert _kernels.measure_bandwidth(engine, np.ones(2001, dtype=np.uint8)) > 0
    with pytest.raises(ValueError, match="too little memory to measure bandwidth: 64 bytes"):
        _kernels.measure_bandwidth(engine, np.ones(64, dtype=np.uint8))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), 61.0])
def test_compute_ceiling_refuses_seconds(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds must be above 0 and at most 60"):
        _kernels.measure_compute(_kernels.Engine(1, "scalar"), seconds)


def test_shapes() -> None:
    assert parse_shape("V3", 64, 8) == LayerShape("v3", 7168, 2048, 64, 8)
    assert parse_shape("256x128", 4, 2) == LayerShape("256x128", 256, 128, 4, 2)
    with pytest.raises(UsageError, match="unknown shape 'big': expected v3, qwen3 or HIDDENxINTERMEDIATE"):
        parse_shape("big", 4, 2)
    with pytest.raises(UsageError, match="top-k 5 of 4 experts"):
        parse_shape("v3", 4, 5)
    with pytest.raises(UsageError, match="every size must be positive"):
        parse_shape("0x128", 4, 2)
