"""Where torch's packed int4 matrices have each code, found out by packing known ones: so that a long prompt
can have the matrix expanded without a second copy of it.

A packed matrix is a row of tiles of some outputs and inputs, the tiles of the same outputs side by side. The
order within a tile is torch's own business and differs between devices; a tile whose codes number their
places shows it, and random codes prove it. Nothing is assumed: a layout that is not of this kind is None.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# _convert_weight_to_int4pack: inner tiles of 16 inputs.
INNER_K_TILES = 8
# Outputs are padded to whole tiles. Tiles (outputs, inputs) that are tried, the first that fits is taken.
PACKED_ROWS = {"cpu": 64, "cuda": 8}
TILES = {"cpu": ((64, 1), (32, 1), (16, 1)), "cuda": ((8, 16 * INNER_K_TILES),)}
PROBE_INPUTS = 256


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """rows, inputs: of a tile; order: int64 [rows * inputs], where a tile's codes lie, row by row."""

    rows: int
    inputs: int
    order: Tensor

    def codes(self, packed: Tensor, first: int, last: int, columns: int) -> Tensor:
        """uint8 [last - first, columns] of 0 to 15: rows of a packed matrix of `columns` inputs; both ends of
        the range are whole tiles."""
        tile_bytes = self.rows * self.inputs // 2
        tiles = packed.view(-1).view(torch.uint8).view(-1, columns // self.inputs, tile_bytes)
        own = tiles[first // self.rows : last // self.rows]
        both = torch.stack((own & 15, own >> 4), dim=-1).flatten(2)
        ordered = both.index_select(2, self.order).unflatten(2, (self.rows, self.inputs))
        return ordered.transpose(1, 2).reshape(last - first, columns)


def pack_codes(codes: Tensor, device: torch.device) -> Tensor:
    """codes uint8 [N, K], N and K whole tiles -> torch's packed matrix on the device."""
    if device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), INNER_K_TILES)
    pairs = codes[:, 0::2] << 4 | codes[:, 1::2]  # takes the even input in the high nibble
    return torch.ops.aten._convert_weight_to_int4pack(pairs.to(device), INNER_K_TILES)


def whole_rows(parts: Tensor, device: torch.device) -> Tensor:
    """With rows of zeros up to whole tiles."""
    unit = PACKED_ROWS[device.type]
    return functional.pad(parts, (0, 0) * (parts.dim() - 1) + (0, -parts.shape[0] % unit))


@functools.cache
def packed_layout(device: torch.device) -> PackedLayout | None:
    """This device's; None where no kind of tile that is known explains it."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(
        0, 16, (2 * PACKED_ROWS[device.type], PROBE_INPUTS), dtype=torch.uint8, generator=generator
    )
    packed = pack_codes(random, device)
    for rows, inputs in TILES[device.type]:
        found = _probed(rows, inputs, device)
        if found is not None and torch.equal(found.codes(packed, 0, len(random), PROBE_INPUTS).cpu(), random):
            return found
    return None


def _probed(rows: int, inputs: int, device: torch.device) -> PackedLayout | None:
    """The order of tiles of this size, if it is one: every place once."""
    size = rows * inputs
    place = torch.arange(rows)[:, None] * inputs + torch.arange(PROBE_INPUTS) % inputs
    place = place.repeat(2 * PACKED_ROWS[device.type] // rows, 1)
    numbers = torch.zeros(size, dtype=torch.int64)
    for digit in range(3):  # of base 16: tiles have at most 4096 codes
        packed = pack_codes((place >> 4 * digit & 15).to(torch.uint8), device)
        own = packed.view(-1).view(torch.uint8)[: size // 2].cpu()
        numbers |= torch.stack((own & 15, own >> 4), dim=-1).flatten().to(torch.int64) << 4 * digit
    if not torch.equal(numbers.sort().values, torch.arange(size)):
        return None
    return PackedLayout(rows, inputs, numbers.argsort().to(device))
