"""PACK.md's "Blob layout", run and read: formulas place every byte, tables hold the code's numbers."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kttools_runtime import _kernels, experts
from tests.engine import ggml_blocks as blocks
from tests.engine import reference as ref

PAGE = Path(experts.__file__).with_name("PACK.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Blob layout\n")[1].split("\n## ")[0]
FORMULAS: dict[str, Callable[..., int]] = {}
exec(re.findall(r"```python\n(.*?)```", SECTION, re.S)[0], FORMULAS)
SIZES = [(64, 32), (40, 24), (72, 40), (130, 70), (200, 17), (1, 1)]  # hidden_size, moe_intermediate_size


def table(first_column: str) -> list[dict[str, str]]:
    """Rows of the table whose first heading is this."""
    lines = SECTION[SECTION.index(f"| {first_column} |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


FORMAT_ROWS = {row["format"]: row for row in table("format")}


def up_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def k_padded(name: str, k: int) -> int:
    return up_to(k, int(FORMAT_ROWS[name]["K is padded to a multiple of"]))


def strip_bytes(name: str, k: int) -> int:
    row = FORMAT_ROWS[name]
    inputs = int(row["inputs per step"]) * int(row["block: steps"])
    return k_padded(name, k) // inputs * int(row["block_bytes"])


def put_row(blob: bytearray, at: int, name: str, w: ref.Array, c: int) -> float:
    """Writes one matrix row w [K] to column c of the strip at `at`, byte by byte; returns its row_scale."""
    k_size = len(w)
    if name == "bf16":
        for k, bits in enumerate(ref.to_bf16(w).tolist()):
            offset = at + FORMULAS["bf16_offset"](k, c)
            blob[offset : offset + 2] = bits.to_bytes(2, "little")
        return 0.0
    if name == "int8":
        q8, scale8 = _kernels.quantize_int8(w[None].copy())
        for k in range(k_size):
            blob[at + FORMULAS["int8_offset"](k, c)] = int(q8[0, k]) & 255
        return float(scale8[0])
    group = int(name.removeprefix("int4_g"))
    q, s, z, scale = _kernels.quantize_int4(w[None].copy(), group)
    for k in range(k_padded(name, k_size)):
        known = k < up_to(k_size, group)
        code = int(q[0, k // 2]) >> (4 * (k % 2)) & 15 if known else 8
        shift = 4 if FORMULAS["int4_nibble_is_high"](k) else 0
        blob[at + FORMULAS["int4_offset"](k, c, group)] |= code << shift
        header = at + FORMULAS["int4_scale_offset"](k, c, group)
        blob[header] = int(s[0, k // group]) if known else 1
        blob[header + 32] = int(z[0, k // group]) if known else 8
    return float(scale[0])


def documented_blob(expert: ref.Expert) -> bytes:
    """The blob of an expert as the page says, in plain Python."""
    name, hidden, inner = expert.format, expert.hidden_size, expert.moe_intermediate_size
    gate_up_strips, down_strips = -(-inner // 16), -(-hidden // 32)
    down_at = gate_up_strips * strip_bytes(name, hidden)
    scales_at = down_at + down_strips * strip_bytes(name, inner)
    scales = np.zeros(32 * (gate_up_strips + down_strips), dtype="<f4")
    blob = bytearray(scales_at)
    for r in range(inner):
        for w, c in ((expert.gate[r], r % 16), (expert.up[r], 16 + r % 16)):
            scales[r // 16 * 32 + c] = put_row(blob, r // 16 * strip_bytes(name, hidden), name, w, c)
    for r in range(hidden):
        at = down_at + r // 32 * strip_bytes(name, inner)
        scales[32 * gate_up_strips + r] = put_row(blob, at, name, expert.down[r], r % 32)
    if name != "bf16":
        blob += scales.tobytes()
    return bytes(blob) + bytes(-len(blob) % 4096)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ref.FORMATS)
def test_every_byte_is_where_the_page_says(name: str, size: tuple[int, int]) -> None:
    expert = ref.random_expert(np.random.default_rng(81), *size, name)
    expert.gate[0] = 0.0  # a row of zeros has codes of its own
    expected = documented_blob(expert)
    assert _kernels.expert_bytes(name, *size) == len(expected)
    assert expert.blob().tobytes() == expected


@pytest.mark.parametrize("size", [(7168, 2048), (2048, 768), (320, 96), (33, 17), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ref.FORMATS)
def test_blob_bytes(name: str, size: tuple[int, int]) -> None:
    hidden, inner = size
    gate_up, down = -(-inner // 16), -(-hidden // 32)
    strips = gate_up * strip_bytes(name, hidden) + down * strip_bytes(name, inner)
    scales = 0 if name == "bf16" else 128 * (gate_up + down)
    assert _kernels.expert_bytes(name, hidden, inner) == up_to(strips + scales, 4096)


def test_formats_of_the_page_are_those_of_the_code() -> None:
    assert list(FORMAT_ROWS) == list(_kernels.FORMATS)
    for row in FORMAT_ROWS.values():
        steps, headers = int(row["block: steps"]), int(row["block: headers"])
        codes = 1024 if row["format"].startswith("int4") else 2048
        assert int(row["block_bytes"]) == steps * codes + headers * 64


@pytest.mark.parametrize("row", table("weight"), ids=lambda row: row["weight"])
def test_worked_example(row: dict[str, str]) -> None:
    """The named weight alone in matrices of zeros: its byte is +127, and only its scale is set beside."""
    match = re.fullmatch(r"(gate|up|down)\[(\d+)\]\[(\d+)\]", row["weight"])
    assert match
    gate, up, down = (np.zeros(shape, dtype=np.float32) for shape in ((32, 64), (32, 64), (64, 32)))
    expert = ref.Expert(gate, up, down, "int8")
    getattr(expert, match[1])[int(match[2]), int(match[3])] = 1.0
    blob = expert.blob()
    assert len(blob) == 12288
    scale_at = (8448 if match[1] == "down" else 8192) + 4 * (32 * int(row["strip"]) + int(row["column"]))
    assert blob[int(row["byte"])] == 127
    assert blob[scale_at : scale_at + 4].view("<f4")[0] == np.float32(1) / np.float32(127)
    assert set(np.flatnonzero(blob)) <= {int(row["byte"]), *range(scale_at, scale_at + 4)}
    parts = [int(number) for number in re.findall(r"(\d+) \w", row["of which"])]
    assert sum(parts) == int(row["byte"])


def test_scale_of_the_worked_example() -> None:
    match = re.search(r"(\d+) \+ 4 \* \(32 \* 1 \+ 20\) = (\d+)", SECTION)
    assert match
    assert int(match[1]) + 4 * (32 + 20) == int(match[2])


BLOCKS: dict[str, Callable[..., Any]] = {}
exec(re.findall(r"```python\n(.*?)```", SECTION, re.S)[1], BLOCKS)
BLOCK_ROWS = {row["format"]: row for row in table("format | inputs per block")}


def six_bits(block: ref.Array, k: int, c: int, is_min: int) -> np.float32:
    value, place = 0, 0
    for byte, shift, width in BLOCKS["six_bit_offsets"](k, c, is_min):
        value |= (int(block[byte]) >> shift & ((1 << width) - 1)) << place
        place += width
    return np.float32(value)


def block_weight(name: str, block: ref.Array, k: int, c: int) -> np.float32:
    """One weight, read from a strip block as the page says."""
    d_at = BLOCKS["d_offset"](name, k, c)
    d, dmin = (np.float32(block[at : at + 2].view("<f2")[0]) for at in (d_at, d_at + 64))
    code = int(block[BLOCKS["code_offset"](name, k, c)])
    if name == "q8_0":
        return d * np.float32(np.uint8(code).view(np.int8))
    code = code >> BLOCKS["code_shift"](name, k) & 15
    if name != "q4_k":
        upper = int(block[BLOCKS["upper_offset"](name, k, c)]) >> BLOCKS["upper_shift"](name, k)
        code |= (upper & (1 if name == "q5_k" else 3)) << 4
    if name == "q6_k":
        return d * np.float32(block[BLOCKS["q6_scale_offset"](k, c)].view(np.int8)) * np.float32(code - 32)
    return d * six_bits(block, k, c, 0) * np.float32(code) - dmin * six_bits(block, k, c, 1)


def block_row(name: str, strip: ref.Array, k_size: int, c: int) -> ref.Array:
    inputs, size = (int(BLOCK_ROWS[name][key]) for key in ("inputs per block", "block_bytes"))
    return np.array([block_weight(name, strip[k // inputs * size :], k % inputs, c) for k in range(k_size)])


@pytest.mark.parametrize("name", BLOCK_ROWS)
def test_blocks_are_where_the_page_says(name: str) -> None:
    hidden, inner = (96, 64) if name == "q8_0" else (256, 256)
    e = blocks.random_expert(np.random.default_rng(82), hidden, inner, name)
    blob, (gate, up, down) = e.blob(), e.floats()
    inputs, size = (int(BLOCK_ROWS[name][key]) for key in ("inputs per block", "block_bytes"))
    _, ggml_inputs, ggml_bytes, _ = blocks.KINDS[name]
    assert size * ggml_inputs == 32 * ggml_bytes * inputs
    strip = -(-hidden // inputs) * size
    for r in (0, 17, inner - 1):
        at = blob[r // 16 * strip :]
        assert np.array_equal(block_row(name, at, hidden, r % 16), gate[r])
        assert np.array_equal(block_row(name, at, hidden, 16 + r % 16), up[r])
    down_at = inner // 16 * strip
    strip = -(-inner // inputs) * size
    for r in (0, 45, hidden - 1):
        at = blob[down_at + r // 32 * strip :]
        assert np.array_equal(block_row(name, at, inner, r % 32), down[r])
    scales_at = down_at + -(-hidden // 32) * strip
    expected = (np.abs(up[20]).max() / np.float32(127)).astype(np.float32)
    assert blob[scales_at + 4 * (32 + 20) :][:4].view("<f4")[0] == expected


def test_block_formats_of_the_page_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", PAGE.split("## Formats\n")[1].split("\n## ")[0], re.M)
    ids = {name: int(number) for number, name in rows}
    assert {name: ids[name] for name in _kernels.FORMATS} == _kernels.FORMATS
    plain = {name: number for name, number in ids.items() if name not in _kernels.FORMATS}
    assert list(plain) == list(BLOCK_ROWS)
    expected = {}
    for first, low in plain.items():
        for second, high in plain.items():
            same = first == second
            expected[first if same else f"{first}_{second}"] = low if same else low + 256 * high
    assert expected == _kernels.BLOCK_FORMATS
