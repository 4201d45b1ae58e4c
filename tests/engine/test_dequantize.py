"""ggml types and FP8 in C++: bit for bit the gguf package's numbers, over every code and hostile scales."""

import gguf
import numpy as np
import pytest
import torch

from kttools.checkpoint.gguf import types
from kttools_runtime import _kernels

BLOCKS = 700
# float16 scales of every kind: zeros, subnormals, usual ones, infinities, NaN.
SCALES = np.array([0, 0x8000, 1, 0x83FF, 0x0400, 0x3C00, 0xBC01, 0x7BFF, 0x7C00, 0xFC00, 0x7E00], np.uint16)
SCALE_AT = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}
CODEBOOK_SCALE_AT = {
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "IQ1_M": (),  # in parts: random bytes have every exponent
}
ALL_TYPES = [*SCALE_AT, *CODEBOOK_SCALE_AT]


def random_blocks(name: str, seed: int) -> np.ndarray:
    """Random bytes, in half of the blocks with a scale of SCALES: [BLOCKS, bytes]."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (BLOCKS, types.BY_NAME[name].bytes), dtype=np.uint8)
    for at in (SCALE_AT | CODEBOOK_SCALE_AT)[name]:
        chosen = rng.choice(SCALES, BLOCKS // 2).astype("<u2")
        data[: BLOCKS // 2, at : at + 2] = chosen.view(np.uint8).reshape(-1, 2)
    return data


def decode(name: str, data: np.ndarray) -> np.ndarray:
    """float32: what the extension makes of whole blocks."""
    if name in SCALE_AT:
        return _kernels.decode_ggml(name, data)
    return _kernels.decode_codebook(name, data, types.grid_of(types.BY_NAME[name]))


def test_table_is_that_of_the_reader() -> None:
    reader = types.BY_NAME
    assert {name: (reader[name].block, reader[name].bytes) for name in SCALE_AT} == _kernels.GGML_TYPES
    grids = {name: types.grid_of(reader[name]).shape for name in CODEBOOK_SCALE_AT}
    assert {name: (reader[name].bytes, *grids[name]) for name in grids} == _kernels.GGML_CODEBOOKS
    assert all(reader[name].block == 256 for name in grids)


@pytest.mark.isa
@pytest.mark.parametrize("name", ALL_TYPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bits_of_the_gguf_package(name: str, seed: int) -> None:
    data = random_blocks(name, seed)
    got = decode(name, data.reshape(-1))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]).reshape(-1)
    is_nan = np.isnan(expected)
    assert np.array_equal(np.isnan(got), is_nan)
    assert np.array_equal(got.view(np.uint32)[~is_nan], expected.view(np.uint32)[~is_nan])
    data[-1] ^= 0xFF  # and another block is seen
    changed = decode(name, data.reshape(-1))
    assert not np.array_equal(changed[-256:].view(np.uint32), got[-256:].view(np.uint32))


@pytest.mark.parametrize("name", ALL_TYPES)
def test_reader_takes_this_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.quants, "dequantize", None)
    data = random_blocks(name, 3)
    kind = types.BY_NAME[name]
    got = types.decode(data.reshape(-1).copy(), kind, kind.block * 7)
    assert tuple(got.shape) == (100, kind.block * 7)
    assert types.decode(data[:0].reshape(-1).copy(), kind, kind.block).shape == (0, kind.block)


@pytest.mark.isa
@pytest.mark.parametrize("name", ALL_TYPES)
def test_sizes_are_checked(name: str) -> None:
    data = random_blocks(name, 4).reshape(-1)
    kind = types.BY_NAME[name]
    for cut in (1, kind.bytes - 1):
        with pytest.raises(ValueError, match="expected whole blocks"):
            decode(name, data[:-cut])
    assert len(decode(name, data[:0])) == 0
    # The last block of a heap allocation of exactly its size: a sanitizer sees a byte read beyond.
    one = np.array(data[-kind.bytes :])
    assert len(decode(name, one)) == kind.block


@pytest.mark.isa
@pytest.mark.parametrize("name", CODEBOOK_SCALE_AT)
@pytest.mark.parametrize("fill", [0, 255])
def test_extreme_indices_stay_in_the_grid(name: str, fill: int) -> None:
    """The first and the last row, in a grid of exactly its size on the heap."""
    kind = types.BY_NAME[name]
    data = np.full(kind.bytes, fill, np.uint8)
    grid = np.array(types.grid_of(kind))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert np.array_equal(_kernels.decode_codebook(name, data, grid), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: _kernels.decode_ggml("IQ1_S", np.zeros(110, np.uint8)),
            "unknown ggml type IQ1_S: expected one of Q4_0",
        ),
        (lambda: _kernels.decode_ggml("Q8_0", np.zeros((1, 34), np.uint8)), "1 dimension"),
        (lambda: _kernels.decode_ggml("Q8_0", np.zeros(34, np.int8)), "data must be uint8"),
        (lambda: _kernels.decode_ggml("Q8_0", np.zeros(68, np.uint8)[::2]), "C-contiguous"),
        (
            lambda: _kernels.decode_codebook("Q8_0", np.zeros(34, np.uint8), np.zeros((1, 8), np.int8)),
            "unknown ggml type Q8_0: expected one of IQ2_XXS",
        ),
        (
            lambda: _kernels.decode_codebook("IQ1_S", np.zeros(50, np.uint8), np.zeros((2047, 8), np.int8)),
            "grid has shape",
        ),
        (
            lambda: _kernels.decode_codebook("IQ3_S", np.zeros(110, np.uint8), np.zeros((512, 4), np.uint8)),
            "grid must be int8",
        ),
        (
            lambda: _kernels.decode_codebook("IQ3_S", np.zeros(111, np.uint8), np.zeros((512, 4), np.int8)),
            "expected whole blocks of 110",
        ),
    ],
)
def test_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.isa
@pytest.mark.parametrize("shape", [(1, 256), (5, 129), (130, 7), (33, 1000)])
@pytest.mark.parametrize("first_row", [0, 3, 15])
def test_fp8_against_torch(shape: tuple[int, int], first_row: int) -> None:
    """torch's own float8_e4m3fn, all 254 finite codes, in blocks of 16 x 64."""
    rng = np.random.default_rng(5)
    finite = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    codes = rng.choice(finite, shape)
    down, across = -(-(first_row + shape[0]) // 16), -(-shape[1] // 64)
    scales = (rng.standard_normal((down, across)) * 10.0 ** rng.integers(-30, 30, (down, across))).astype(
        np.float32
    )
    out = torch.empty(shape, dtype=torch.bfloat16)
    assert _kernels.decode_fp8(codes, scales, 16, 64, first_row, out.view(torch.uint16).numpy())
    wide = np.repeat(np.repeat(scales, 16, axis=0)[first_row:][: shape[0]], 64, axis=1)[:, : shape[1]]
    expected = (torch.from_numpy(codes).view(torch.float8_e4m3fn).float() * torch.from_numpy(wide)).to(
        torch.bfloat16
    )
    assert torch.equal(out.view(torch.uint16), expected.view(torch.uint16))
    for nan in (0x7F, 0xFF):
        codes[-1, -1] = nan
        assert not _kernels.decode_fp8(codes, scales, 16, 64, first_row, out.view(torch.uint16).numpy())


@pytest.mark.isa
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": np.ones((1, 2), np.float32)}, "scales has shape"),
        ({"scales": np.ones((2, 1), np.float32)}, "scales has shape"),
        ({"block_rows": 0}, "1 to 1048576"),
        ({"block_cols": 1 << 62}, "1 to 1048576"),
        ({"first_row": 16}, "first_row"),
        ({"first_row": -1}, "first_row"),
        ({"out": np.zeros((20, 99), np.uint16)}, "out has shape"),
        ({"codes": np.zeros(2000, np.uint8)}, "2 dimensions"),
    ],
)
def test_fp8_sizes_are_checked(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "codes": np.zeros((20, 100), np.uint8),
        "scales": np.ones((2, 2), np.float32),
        "block_rows": 16,
        "block_cols": 64,
        "first_row": 0,
        "out": np.zeros((20, 100), np.uint16),
    }
    with pytest.raises(ValueError, match=message):
        _kernels.decode_fp8(**(given | change))  # type: ignore[arg-type]
