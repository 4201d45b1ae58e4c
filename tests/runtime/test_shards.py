"""Reading a bundle's shards: each format against plain arithmetic, and one file for each way to be wrong."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.shards import ShardWeights
from tests.forge import save

N, K, GROUP = 6, 70, 32
PADDED = 96
Parts = dict[str, Tensor]


def int4_parts(seed: int = 0) -> tuple[Parts, Tensor]:
    """Random parts of an int4 matrix [N, K] and the matrix, code by code in plain Python."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (N, PADDED), generator=generator)
    s = torch.randint(1, 17, (N, PADDED // GROUP), generator=generator)
    low = (15 * s - 127).clamp(min=0)
    z = low + (torch.rand(s.shape, generator=generator) * (128 - low)).to(torch.int64)
    scale = torch.rand(N, generator=generator)
    rows = [
        [float(scale[n]) * int(s[n, k // GROUP] * q[n, k] - z[n, k // GROUP]) for k in range(K)]
        for n in range(N)
    ]
    parts = {
        "x.qweight": (q[:, 0::2] | q[:, 1::2] << 4).to(torch.uint8),
        "x.group_scale": s.to(torch.uint8),
        "x.group_zero": z.to(torch.uint8),
        "x.row_scale": scale,
    }
    return parts, torch.tensor(rows)


def int8_parts(seed: int = 0) -> tuple[Parts, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (N, K), generator=generator)
    scale = torch.rand(N, generator=generator)
    return {"x.qweight": q.to(torch.int8), "x.row_scale": scale}, q * scale[:, None]


def opened(path: Path, parts: Parts, formats: dict[str, str] | None = None) -> ShardWeights:
    save(path / "model-00001-of-00001.safetensors", parts)
    return ShardWeights(sorted(path.glob("*.safetensors")), formats or {})


def test_float_matrix_is_read_as_it_is(tmp_path: Path) -> None:
    weight = torch.randn(N, K).to(torch.bfloat16)
    shards = opened(tmp_path, {"x.weight": weight}, {"x": "bf16"})
    assert torch.equal(shards.linear("x", N, K).dequantized(), weight)
    assert torch.equal(shards.tensor("x.weight", (N, K)), weight)


def test_int8_matrix(tmp_path: Path) -> None:
    parts, expected = int8_parts()
    matrix = opened(tmp_path, parts, {"x": "int8"}).linear("x", N, K)
    assert matrix.format == "int8"
    assert torch.equal(matrix.dequantized(), expected)


def test_int4_matrix_with_a_short_last_group(tmp_path: Path) -> None:
    parts, expected = int4_parts()
    matrix = opened(tmp_path, parts, {"x": "int4"}).linear("x", N, K)
    assert (matrix.format, matrix.group_size, matrix.in_features) == ("int4", GROUP, K)
    torch.testing.assert_close(matrix.dequantized(), expected, rtol=1e-6, atol=0.0)


def test_parts_may_lie_in_different_files(tmp_path: Path) -> None:
    parts, expected = int8_parts()
    save(tmp_path / "a.safetensors", {"x.row_scale": parts.pop("x.row_scale")})
    assert torch.equal(opened(tmp_path, parts).linear("x", N, K).dequantized(), expected)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Parts], None]:
    def apply(parts: Parts) -> None:
        parts[name] = change(parts[name])

    return apply


def value_at(name: str, value: float) -> Callable[[Parts], None]:
    """The first element of a part set to a value."""

    def apply(parts: Parts) -> None:
        parts[name].view(-1)[0] = value

    return apply


def both(*changes: Callable[[Parts], None]) -> Callable[[Parts], None]:
    def apply(parts: Parts) -> None:
        for change in changes:
            change(parts)

    return apply


WRONG = {
    "no part": (lambda parts: parts.clear(), "no shard holds x.weight"),
    "part missing": (lambda parts: parts.pop("x.row_scale"), "no shard holds x.weight"),
    "shape of scale": (changed("x.row_scale", lambda t: t[:-1]), "x.row_scale: expected shape"),
    "dtype of scale": (changed("x.row_scale", lambda t: t.half()), "x.row_scale: expected float32"),
    "dtype of codes": (changed("x.qweight", lambda t: t.to(torch.int8)), "x.qweight: expected uint8"),
    "columns": (changed("x.group_zero", lambda t: t[:, :-1].clone()), "x.group_zero: expected shape"),
    "rows": (changed("x.group_scale", lambda t: t[:-1].clone()), "x.group_scale: expected shape"),
    "scale 0": (value_at("x.group_scale", 0), "leave int8"),
    "scale 17": (value_at("x.group_scale", 17), "leave int8"),
    "zero 129": (value_at("x.group_zero", 129), "leave int8"),
    "sum": (both(value_at("x.group_scale", 16), value_at("x.group_zero", 112)), "leave int8"),
    "nan": (value_at("x.row_scale", float("nan")), "x.row_scale holds a value that is not"),
    "infinity": (value_at("x.row_scale", float("inf")), "x.row_scale holds a value that is not"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_int4_matrix_is_refused(tmp_path: Path, case: str) -> None:
    change, message = WRONG[case]
    parts, _ = int4_parts()
    change(parts)
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        opened(tmp_path, parts | {"other": torch.zeros(1)}).linear("x", N, K)


def test_the_bounds_of_a_group_are_allowed(tmp_path: Path) -> None:
    parts, _ = int4_parts()
    for index, (scale, zero) in enumerate([(1, 0), (1, 128), (16, 113), (16, 128)]):
        parts["x.group_scale"].view(-1)[index] = scale
        parts["x.group_zero"].view(-1)[index] = zero
    w = opened(tmp_path, parts).linear("x", N, K)
    assert w.format == "int4"


def test_groups_of_an_unknown_size_are_refused(tmp_path: Path) -> None:
    parts = {
        "x.qweight": torch.zeros(N, 8, dtype=torch.uint8),
        "x.group_scale": torch.ones(N, 1, dtype=torch.uint8),
        "x.group_zero": torch.zeros(N, 1, dtype=torch.uint8),
        "x.row_scale": torch.ones(N),
    }
    with pytest.raises(CorruptFileError, match="groups of 16, expected one of 32, 64, 128"):
        opened(tmp_path, parts).linear("x", N, 16)


def test_sizes_are_those_the_model_wants(tmp_path: Path) -> None:
    parts, _ = int4_parts()
    shards = opened(tmp_path, parts)
    with pytest.raises(CorruptFileError, match="x: expected 7 output rows, got 6"):
        shards.linear("x", N + 1, K)
    with pytest.raises(InvalidInputError, match=r"x\.group_\w+: expected shape"):
        shards.linear("x", N, PADDED + 1)
    with pytest.raises(CorruptFileError, match=r"tensor x\.row_scale: expected shape \[7\], got \[6\]"):
        shards.tensor("x.row_scale", (N + 1,))
    with pytest.raises(CorruptFileError, match=r"no shard holds tensor y"):
        shards.tensor("y", (1,))


def test_the_manifest_and_the_shards_must_agree(tmp_path: Path) -> None:
    parts, _ = int8_parts()
    with pytest.raises(CorruptFileError, match="the manifest says int4, the shards hold int8"):
        opened(tmp_path, parts, {"x": "int4"}).linear("x", N, K)


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", {"x.weight": torch.zeros(1, 1)})
    with pytest.raises(CorruptFileError, match=r"tensor x\.weight is also in"):
        opened(tmp_path, {"x.weight": torch.zeros(1, 1)})


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """Data that is cut off after opening is noticed when it is read, not before."""
    shards = opened(tmp_path, {"x.weight": torch.zeros(N, K)})
    file = tmp_path / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="truncated"):
        shards.tensor("x.weight", (N, K))
