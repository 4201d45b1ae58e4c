"""int4 and int8 matrices of a device: the packed kernel for few rows, expanded for many, the same numbers."""

from typing import Any

import pytest
import torch

from kttools_runtime import _kernels
from kttools_runtime.hybrid import linears, packed_layout
from kttools_runtime.hybrid.linears import CodesLinear, PackedInt4Linear, linear_maker
from kttools_runtime.weights import PARTS, LinearWeights
from tests.compare import assert_close
from tests.memory import PeakBytes

CPU = torch.device("cpu")
ROWS = 40
# One rounding of bf16 to a product's inputs and none to its sum of K terms.
TOL = 2**-7


def matrix(rows: int, columns: int, group: int) -> LinearWeights:
    """group 0: int8."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).numpy()
    form = "int4" if group else "int8"
    made = _kernels.quantize_int4(weight, group) if group else _kernels.quantize_int8(weight)
    parts = {name: torch.from_numpy(part) for name, part in zip(PARTS[form], made, strict=True)}
    return LinearWeights("w", columns, form, parts)


def test_the_layout_is_found_here() -> None:
    """And random codes of several tiles come back, any whole rows of them."""
    layout = packed_layout.packed_layout(CPU)
    assert layout is not None
    assert (layout.rows, layout.inputs) in packed_layout.TILES["cpu"]
    codes = torch.randint(0, 16, (192, 320), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = packed_layout.pack_codes(codes, CPU)
    for first, last in ((0, 192), (64, 128), (128, 192)):
        assert torch.equal(layout.codes(packed, first, last, 320), codes[first:last])


def test_a_tile_as_cudas_is_found() -> None:
    """A stand-in with tiles of 8 outputs and 128 inputs in an order of its own, as CUDA's matrices have."""
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(1))

    def pack(codes: torch.Tensor, _: torch.device) -> torch.Tensor:
        tiles = codes.view(codes.shape[0] // 8, 8, -1, 128).transpose(1, 2).flatten(2)[..., order]
        return (tiles[..., 0::2] | tiles[..., 1::2] << 4).contiguous().view(torch.int32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_layout, "pack_codes", pack)
        patch.setitem(packed_layout.TILES, "cpu", packed_layout.TILES["cuda"])
        found = packed_layout.packed_layout.__wrapped__(CPU)
        assert found is not None
        codes = torch.randint(0, 16, (24, 384), dtype=torch.uint8)
        assert torch.equal(found.codes(pack(codes, CPU), 8, 24, 384), codes[8:])
        patch.setattr(packed_layout, "pack_codes", lambda codes, device: pack(codes.flip(0), device))
        assert packed_layout.packed_layout.__wrapped__(CPU) is None  # random codes prove it


@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(64, 128, 32), (33, 200, 64), (150, 384, 128), (70, 100, 0)]
)
@pytest.mark.parametrize("piece", [1 << 14, 64 << 20])
def test_expanded_is_the_matrix(
    rows: int, columns: int, group: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact in float32 for every size of piece; in bf16 within the rounding of its inputs."""
    monkeypatch.setattr(linears, "EXPANDED_BYTES", piece)
    own = matrix(rows, columns, group)
    x = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    wanted = x @ own.dequantized().T
    if group:
        made: Any = PackedInt4Linear(own, CPU, torch.bfloat16, None, ROWS)
        assert_close(made(x[: ROWS - 1]), wanted[: ROWS - 1], TOL, "kernel")
        weight = made._expanded(0, -(-rows // made.layout.rows) * made.layout.rows)[:rows, :columns]
    else:
        made = CodesLinear(own, CPU, torch.bfloat16, None, False, ROWS)
        weight = made._expanded(0, rows)
    assert torch.equal(weight.float() * made.row_scale[:, None], own.dequantized())
    assert_close(made(x), wanted, TOL, "expanded")


def test_rows_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel below dense_rows, the expanded matrix from there on; always the kernel without a layout."""
    made: Any = linear_maker(CPU, torch.bfloat16)(matrix(64, 128, 64), None)
    seen: list[int] = []
    product = linears.expanded_product
    monkeypatch.setattr(
        linears, "expanded_product", lambda x, *rest: (seen.append(len(x)), product(x, *rest))[1]
    )
    for rows in (1, linears.DENSE_ROWS - 1, linears.DENSE_ROWS, 300):
        made(torch.ones(rows, 128))
    assert seen == [linears.DENSE_ROWS, 300]
    made.layout = None
    made(torch.ones(300, 128))
    assert len(seen) == 2


def test_what_is_expanded_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of many rows holds its result, and twice the piece that plan counts."""
    from kttools_runtime.device_footprint import EXPANSION

    monkeypatch.setattr(linears, "EXPANDED_BYTES", 1 << 18)
    made: Any = PackedInt4Linear(matrix(4096, 512, 128), CPU, torch.bfloat16, None, 16)
    x = torch.ones(16, 512)
    made(x)
    with PeakBytes() as peak:
        made(x)
    result, products = 4 * 16 * 4096, (2 + 4) * 16 * 4096
    assert (1 << 18) < peak.bytes < EXPANSION * (1 << 18) + result + products
