"""Where tensors lie in shards, read back with the safetensors library; docs/shards.md against the code."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from kttools.families import open_model
from kttools.quantize.recipe import Recipe
from kttools.quantize.shard_layout import (
    HEADER_ALIGNMENT,
    ShardFile,
    StoredTensor,
    index_bytes,
    shard_files,
    shard_tensor,
)
from kttools.quantize.shard_writer import open_shard
from kttools_runtime.errors import KTError
from kttools_runtime.safetensors_file import read_header
from tests.quantize.conftest import contents

PAGE = Path(__file__).resolve().parents[2] / "docs" / "shards.md"


def shards_of(checkpoint: Path, shard_bytes: int, gpu_format: str = "int4") -> tuple[ShardFile, ...]:
    recipe = Recipe("int8", gpu_format, 32)
    return shard_files((shard_tensor(t, recipe) for t in open_model(checkpoint).tensors), shard_bytes)


def test_files_are_filled_in_order_up_to_the_limit(checkpoint: Path) -> None:
    limit = 20_000
    shards = shards_of(checkpoint, limit)
    assert [s.name for s in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 3
    for shard, following in pairwise(shards):
        held = sum(t.bytes for t in shard.tensors)
        assert held <= limit or len(shard.tensors) == 1
        assert held + following.tensors[0].bytes > limit
    names = [t.source.name for s in shards for t in s.tensors]
    assert names == [t.name for t in open_model(checkpoint).tensors]


@pytest.mark.parametrize("gpu_format", ["int4", "int8", "bf16"])
def test_headers_are_valid_and_aligned(checkpoint: Path, tmp_path: Path, gpu_format: str) -> None:
    shards = shards_of(checkpoint, 30_000, gpu_format)
    for shard in shards:
        file = tmp_path / shard.name
        with open_shard(file, shard) as writer:
            for tensor in shard.tensors:
                for part in tensor.parts:
                    writer.write(part, 0, np.zeros((part.shape[0], part.bytes // part.shape[0]), np.uint8))
        header = read_header(file)
        assert header.file_bytes == shard.bytes
        assert len(shard.header) % HEADER_ALIGNMENT == 0
        for name, info in header.tensors.items():
            assert info.offset == shard.offsets[name]
            assert info.offset % (info.bytes // max(1, int(np.prod(info.shape)))) == 0
        with safe_open(str(file), "pt") as library:
            for tensor in shard.tensors:
                for part in tensor.parts:
                    assert tuple(library.get_tensor(part.name).shape) == part.shape
    index = json.loads(index_bytes(shards))
    assert index["metadata"]["total_size"] == sum(t.bytes for s in shards for t in s.tensors)
    assert set(index["weight_map"].values()) == {s.name for s in shards}


def test_writer_refuses_rows_that_do_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    (shard, *_) = shards_of(checkpoint, 1 << 30)
    part = next(p for t in shard.tensors for p in t.parts if p.dtype == "U8")
    row = np.zeros((1, part.shape[1]), np.uint8)
    with open_shard(tmp_path / shard.name, shard) as writer:
        with pytest.raises(ValueError, match="cannot take"):
            writer.write(part, part.shape[0], row)
        with pytest.raises(ValueError, match="cannot take"):
            writer.write(part, 0, row[:, :-1].copy())


def test_a_failed_shard_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    (shard, *_) = shards_of(checkpoint, 1 << 30)

    def fail() -> None:
        with open_shard(tmp_path / shard.name, shard):
            raise KTError("boom")

    with pytest.raises(KTError, match="boom"):
        fail()
    assert contents(tmp_path) == {}


def page_parts() -> list[tuple[str, str, str, str]]:
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \| (\[.*?\]) \|", PAGE.read_text(encoding="ascii"), re.M)
    return [(row[0], row[1], row[2], row[3]) for row in rows]


def test_the_page_has_the_parts_of_the_code(checkpoint: Path) -> None:
    source = next(t for t in open_model(checkpoint).tensors if t.name.endswith("q_a_proj.weight"))
    rows, columns = source.shape
    groups = -(-columns // 32)
    sizes = {"N": rows, "K": columns, "Kp / 2": groups * 16, "Kp / G": groups}
    found = []
    for name in ("bf16", "int8", "int4"):
        tensor = shard_tensor(source, Recipe("int8", name, 32))
        found += [(name, part) for part in tensor.parts]
    expected = []
    for name, part, dtype, shape in page_parts():
        dims = tuple(sizes[key.strip()] for key in shape.strip("[]").split(","))
        expected.append((name, StoredTensor(f"{source.name.removesuffix('.weight')}.{part}", dtype, dims)))
    assert found == expected


def test_the_example_of_the_page() -> None:
    text = PAGE.read_text(encoding="ascii").split("## Example")[1]
    codes = bytes.fromhex(re.search(r"qweight bytes `([0-9a-f ]+)`", text)[1])  # type: ignore[index]
    q = [nibble for byte in codes for nibble in (byte & 15, byte >> 4)]
    s, z, scale = 2, 15, 0.5
    assert q == [1, 10, 15, 0]
    assert [scale * (s * code - z) for code in q] == [-6.5, 2.5, 7.5, -7.5]
    assert "w = -6.5, 2.5, 7.5, -7.5" in text
