"""Quantisation and expert blobs: the same bytes everywhere, error bounds, refusals, rows of every size."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from kttools_runtime import _kernels
from tests.engine import reference as ref

SIZES = [(64, 32), (320, 96), (72, 40), (1, 1), (33, 17), (129, 131)]
GROUPS = [32, 64, 128]


def digests() -> dict[str, str]:
    """SHA-256 of a blob of every format, packed while whatever table is forced is in use."""
    _kernels.Engine(1, None)
    result = {}
    for name in ref.FORMATS:
        blob = ref.random_expert(np.random.default_rng(41), 200, 72, name).blob()
        result[name] = hashlib.sha256(blob.tobytes()).hexdigest()
    return result


PACK = """
import json
from kttools_runtime.experts import ExpertEngine
from tests.engine.test_packs import digests
print(json.dumps([ExpertEngine(1).isa, digests()]))
"""


def test_every_table_writes_the_same_bytes(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTTOOLS_ISA", isa)
    done = subprocess.run([sys.executable, "-c", PACK], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [isa, digests()]


@pytest.mark.parametrize("name", ref.FORMATS)
def test_blob_is_fully_written(name: str) -> None:
    """Padding included: what was in the buffer before does not show."""
    expert = ref.random_expert(np.random.default_rng(42), 72, 40, name)
    first = expert.blob()  # over 0xA5
    second = np.zeros_like(first)
    gate, up, down = (ref.to_bf16(w) for w in (expert.gate, expert.up, expert.down))
    _kernels.pack_expert(name, gate, up, down, second)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("name", ref.FORMATS)
def test_float32_and_bf16_sources_agree(name: str) -> None:
    expert = ref.random_expert(np.random.default_rng(43), 72, 40, name)
    wide = np.zeros_like(expert.blob())
    _kernels.pack_expert(name, expert.gate, expert.up, expert.down, wide)
    assert np.array_equal(wide, expert.blob())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ref.FORMATS)
def test_round_trip(name: str, size: tuple[int, int]) -> None:
    """bf16: exact. int8 and int4: exactly the integers that the quantiser gives, times the row scale."""
    expert = ref.random_expert(np.random.default_rng(44), *size, name)
    stored = _kernels.unpack_expert(name, expert.blob(), *size)
    for got, w in zip(stored, (expert.gate, expert.up, expert.down), strict=True):
        if name == "bf16":
            assert np.array_equal(got, w)
        else:
            integers, scale = ref.integer_weights(w, name)
            assert np.array_equal(got, integers.astype(np.float32) * scale[:, None])


def test_bf16_rounds_wider_sources_to_nearest_even() -> None:
    bits = np.array([[0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF]], dtype=np.uint32)
    w = bits.view(np.float32)
    blob = ref.aligned(_kernels.expert_bytes("bf16", 4, 1))
    _kernels.pack_expert("bf16", w, w, w.T.copy(), blob)
    gate, _, _ = _kernels.unpack_expert("bf16", blob, 4, 1)
    assert gate.view(np.uint32).tolist() == [[0x3F800000, 0x3F820000, 0x3F810000, 0x3F800000]]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 129)])
def test_int8_is_numpy_int8(shape: tuple[int, int]) -> None:
    w = np.random.default_rng(45).standard_normal(shape).astype(np.float32)
    q, scale = _kernels.quantize_int8(w)
    expected, expected_scale = ref.int8_rows(w)
    assert q.dtype == np.int8
    assert np.array_equal(q, expected)
    assert np.array_equal(scale, expected_scale)
    assert np.abs(q).max(axis=1).tolist() == [127] * len(w)
    # half a step, and one rounding of the product
    ref.within(q * scale[:, None], w, (0.5 + 127 * 2 * ref.U) * scale[:, None])


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    "kind",
    [
        "gaussian",
        "shifted",
        "outlier",
        "one sign",
        "constant",
        "mixed scales",
    ],
)
def test_int4_invariants(group: int, kind: str) -> None:
    """1 <= s <= 16, 0 <= z <= 128 and every code of a group inside int8; the error is bounded by its range.

    The range reaches to zero (z cannot be negative) and may be shrunk to 0.7, so that an end is off by 0.3 of
    its magnitude; inside, half a step of range / 15 and what rounding s to an integer adds.
    """
    rng = np.random.default_rng(46)
    w: ref.Array = rng.standard_normal((24, 300))
    if kind == "shifted":
        w = w * 0.02 + 1.0
    elif kind == "outlier":
        w[:, 5] = 60.0
    elif kind == "one sign":
        w = -np.abs(w)
    elif kind == "constant":
        w = np.full_like(w, 0.37)
    elif kind == "mixed scales":
        w *= 10.0 ** rng.uniform(-3, 0, w.shape)
    w = w.astype(np.float32)
    q, s, z, scale = parts = _kernels.quantize_int4(w, group)
    padded = -(-300 // group) * group
    assert (q.shape, s.shape, z.shape) == ((24, padded // 2), (24, padded // group), (24, padded // group))
    low, high = -z.astype(int), 15 * s.astype(int) - z
    assert (s.min() >= 1, s.max() <= 16, low.min() >= -128, high.max() <= 127) == (True,) * 4
    integers, _ = ref.int4_weights(parts, 300, group)
    stored = integers * scale[:, None].astype(np.float64)
    assert np.array_equal(_kernels.dequantize_int4(*parts, 300, group), stored.astype(np.float32))
    groups = np.array_split(np.arange(300), range(group, 300, group))
    for columns in groups:
        part = w[:, columns]
        reach = np.maximum(part.max(axis=1), 0) - np.minimum(part.min(axis=1), 0)
        limit = 0.32 * np.maximum(reach, 15 * scale)[:, None]
        ref.within(stored[:, columns], part, limit, f"columns from {columns[0]}")
    if kind == "gaussian":
        rms = np.sqrt(np.mean((stored - w) ** 2))
        assert rms < {32: 0.080, 64: 0.092, 128: 0.102}[group]


@pytest.mark.parametrize("group", GROUPS)
def test_int4_beats_row_wise_rounding(group: int) -> None:
    """On rows with one outlier per 512 the groups keep the rest: the error is far below one scale per row."""
    rng = np.random.default_rng(47)
    w = rng.standard_normal((16, 512)).astype(np.float32)
    w[:, 100] = 12.0
    row_step = np.abs(w).max(axis=1, keepdims=True) / 7
    row_wise = np.sqrt(np.mean((np.rint(w / row_step) * row_step - w) ** 2))
    stored = _kernels.dequantize_int4(*_kernels.quantize_int4(w, group), 512, group)
    assert np.sqrt(np.mean((stored - w) ** 2)) < 0.6 * row_wise


@pytest.mark.parametrize("name", ref.FORMATS)
def test_zero_rows(name: str) -> None:
    expert = ref.random_expert(np.random.default_rng(48), 72, 40, name)
    expert.gate[3], expert.up[:], expert.down[71] = 0.0, 0.0, 0.0
    gate, up, down = _kernels.unpack_expert(name, expert.blob(), 72, 40)
    assert (gate[3].any(), up.any(), down[71].any()) == (False, False, False)
    assert gate[4].any()


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-31, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("name", ref.FORMATS)
def test_rows_of_every_size(name: str, size: float) -> None:
    """Denormal rows become zero (their inverse would overflow), every other size keeps its relative error."""
    rng = np.random.default_rng(49)
    w = rng.uniform(-1, 1, (16, 64)).astype(np.float32)
    tiny = (w.astype(np.float64) * size).astype(np.float32)
    blob = ref.aligned(_kernels.expert_bytes(name, 64, 16))
    _kernels.pack_expert(name, tiny, tiny, np.ascontiguousarray(tiny.T), blob)
    gate, up, _ = _kernels.unpack_expert(name, blob, 64, 16)
    assert np.isfinite(gate).all()
    assert np.array_equal(gate, up)
    if size < 1e-30 and name != "bf16":
        assert not gate.any()
    elif size >= 1e-18:
        limit = {"bf16": 2.0**-8, "int8": 2.0**-7}.get(name, 0.2)
        ref.within(gate / np.float32(size), w, limit)


@pytest.mark.parametrize("value", [3.0e38, -3.3e38])
@pytest.mark.parametrize("name", ref.FORMATS)
def test_largest_floats(name: str, value: float) -> None:
    """Both signs of nearly the largest float in one row: no scale overflows."""
    w = np.zeros((16, 64), dtype=np.float32)
    w[:, 0], w[:, 1] = value, -value
    blob = ref.aligned(_kernels.expert_bytes(name, 64, 16))
    _kernels.pack_expert(name, w, w, np.ascontiguousarray(w.T), blob)
    for got, expected in zip(_kernels.unpack_expert(name, blob, 64, 16), (w, w, w.T), strict=True):
        ref.within(
            got / np.float32(1e30),
            expected / np.float32(1e30),
            abs(value) / 1e30 * (0.32 if name.startswith("int4") else 0.02),
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ref.FORMATS)
@pytest.mark.parametrize("matrix", ["gate", "up", "down"])
def test_not_finite_is_refused(name: str, matrix: str, value: float) -> None:
    """The message names row and column of the source matrix, for float32 and for bf16."""
    for wide in (True, False):
        expert = ref.random_expert(np.random.default_rng(50), 72, 40, name)
        w = {"gate": expert.gate, "up": expert.up, "down": expert.down}
        w[matrix][23, 37] = value
        arrays = [w[key] if wide else ref.to_bf16(w[key]) for key in ("gate", "up", "down")]
        if not wide:
            arrays[["gate", "up", "down"].index(matrix)][23, 37] = 0x7FC0 if np.isnan(value) else 0x7F80
        blob = ref.aligned(_kernels.expert_bytes(name, 72, 40))
        with pytest.raises(ValueError, match="row 23, column 37 is not a finite number"):
            _kernels.pack_expert(name, arrays[0], arrays[1], arrays[2], blob)


def test_not_finite_is_refused_by_the_row_quantisers() -> None:
    w = np.ones((4, 40), dtype=np.float32)
    w[2, 39] = np.nan
    with pytest.raises(ValueError, match="row 2, column 39 is not a finite number"):
        _kernels.quantize_int8(w)
    for group in GROUPS:
        with pytest.raises(ValueError, match="row 2, column 39 is not a finite number"):
            _kernels.quantize_int4(w, group)


@pytest.mark.parametrize(("s", "z"), [(0, 0), (17, 128), (1, 129), (16, 112), (9, 7)])
def test_codes_outside_int8_are_refused(s: int, z: int) -> None:
    q, scales, zeros, row_scale = _kernels.quantize_int4(np.ones((3, 64), dtype=np.float32), 64)
    scales[1, 0], zeros[1, 0] = s, z
    with pytest.raises(ValueError, match=rf"group_scale {s} and group_zero {z} of row 1 leave int8"):
        _kernels.PackedLinear.from_int4(_kernels.Engine(1), q, scales, zeros, row_scale, 64, 64)
