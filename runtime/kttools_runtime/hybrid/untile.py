"""Experts of a pack as row-major codes on a device: the bytes travel, the device orders them (PACK.md)."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kttools_runtime import _kernels
from kttools_runtime.pack import PackHeader, format_names, read_pack_header
from kttools_runtime.weights import LinearWeights

COLUMNS, TILES = 16, 2  # columns of a tile, tiles of a strip
INT4_GROUPS = {"int4_g32": 32, "int4_g64": 64, "int4_g128": 128}
ORDERED = ("bf16", "int8", *INT4_GROUPS)  # formats whose bytes the device puts in order itself
SCALES_BYTES = 4 * TILES * COLUMNS


@dataclass(frozen=True, slots=True)
class ExpertCodes:
    """One expert: gate and up stacked, [2 I, H], and down, [H, I], in the codes of its pack."""

    gate_up: LinearWeights
    down: LinearWeights

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for matrix in (self.gate_up, self.down) for p in matrix.parts.values())


class PackFile:
    """The experts of one layer, read with pread: a mapping of the file is not touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: PackHeader = read_pack_header(path)
        self._names = format_names()

    def blob_bytes(self, expert: int) -> int:
        return self.header.experts[expert].bytes

    def name_of(self, expert: int) -> str:
        """The expert's format."""
        return self._names[self.header.experts[expert].format]

    @property
    def names(self) -> frozenset[str]:
        """Formats that occur."""
        return frozenset(self.header.formats)

    def read(self, expert: int, target: Tensor, keep_cached: bool = True) -> None:
        """The expert's bytes into the first blob_bytes of a host tensor. Raises OSError where they end early.

        keep_cached: False drops the bytes from the page cache again, for experts that no CPU will read.
        """
        entry = self.header.experts[expert]
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not keep_cached:  # or the kernel reads the neighbours too
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            view, position = target.numpy().data, 0
            while position < entry.bytes:
                count = os.preadv(descriptor, [view[position : entry.bytes]], entry.offset + position)
                if count == 0:
                    raise OSError(f"{self.path}: expert {expert} is cut short")
                position += count
            if not keep_cached:
                os.posix_fadvise(descriptor, entry.offset, entry.bytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def payload_bytes(self, expert: int) -> int:
        """What travels to a device: the blob, or bf16 matrices of a format that it cannot put in order."""
        hidden, inner = self.shape
        return self.blob_bytes(expert) if self.name_of(expert) in ORDERED else 6 * hidden * inner

    def fill(self, expert: int, target: Tensor) -> None:
        """The payload into a uint8 host tensor of its size."""
        if self.name_of(expert) in ORDERED:
            return self.read(expert, target)
        gate_up, down = self.matrices(expert)
        flat = target.view(torch.bfloat16)
        flat[: gate_up.numel()].copy_(gate_up.flatten())
        flat[gate_up.numel() :].copy_(down.flatten())

    def arranged(self, expert: int, payload: Tensor) -> ExpertCodes:
        """The codes of a payload that lies on a device; they may be views of it."""
        name, (hidden, inner) = self.name_of(expert), self.shape
        if name in ORDERED:
            return expert_codes(payload, name, hidden, inner, payload.device)
        gate_up, down = payload.view(torch.bfloat16).split([2 * hidden * inner, hidden * inner])
        shaped = gate_up.view(2 * inner, hidden), down.view(hidden, inner)
        return ExpertCodes(*(LinearWeights("expert", w.shape[1], "float", {"weight": w}) for w in shaped))

    def matrices(self, expert: int, keep_cached: bool = True) -> tuple[Tensor, Tensor]:
        """Gate and up stacked, [2 I, H], and down, [H, I], in float32 on the host."""
        blob = torch.empty(self.blob_bytes(expert), dtype=torch.uint8)
        self.read(expert, blob, keep_cached)
        return unpacked(blob, self.name_of(expert), *self.shape)

    def codes(self, expert: int, device: torch.device, keep_cached: bool = True) -> ExpertCodes:
        """In the codes of the pack. keep_cached: see read()."""
        staging = torch.empty(self.blob_bytes(expert), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.read(expert, staging, keep_cached)
        return expert_codes(staging, self.name_of(expert), *self.shape, device)

    @property
    def shape(self) -> tuple[int, int]:
        """(hidden_size, moe_intermediate_size)."""
        return self.header.hidden_size, self.header.moe_intermediate_size


def expert_codes(blob: Tensor, name: str, hidden: int, inner: int, device: torch.device) -> ExpertCodes:
    """blob uint8 on the host -> codes on the device. A format without a rule here comes dequantised."""
    if name not in ORDERED:
        return _dequantised(blob, name, hidden, inner, device)
    blob = blob.to(device, non_blocking=True)
    gate_up_strips, down_strips = -(-inner // COLUMNS), -(-hidden // (TILES * COLUMNS))
    sections = [gate_up_strips * strip_bytes(name, hidden), down_strips * strip_bytes(name, inner)]
    if name != "bf16":
        sections += [gate_up_strips * SCALES_BYTES, down_strips * SCALES_BYTES]
    parts = blob[: sum(sections)].split(sections)
    scales = [p.view(torch.float32).view(-1, TILES, COLUMNS) for p in parts[2:]] or [None, None]
    gate_up = _matrix(name, parts[0], gate_up_strips, scales[0])
    down = _matrix(name, parts[1], down_strips, scales[1])
    # [strips, 2, 16, ...]: gate is tile 0 of every strip and up tile 1; down goes on from tile to tile.
    both = {key: torch.cat([v[:, t].flatten(0, 1)[:inner] for t in (0, 1)]) for key, v in gate_up.items()}
    one = {key: v.flatten(0, 2)[:hidden] for key, v in down.items()}
    form = {"bf16": "float", "int8": "int8"}.get(name, "int4")
    return ExpertCodes(_weights(form, both, hidden, name), _weights(form, one, inner, name))


def strip_bytes(name: str, k: int) -> int:
    """Bytes of a strip over k inputs."""
    if name in INT4_GROUPS:
        group = INT4_GROUPS[name]
        return -(-k // max(group, 64)) * _block_bytes(group)
    return -(-k // (32 if name == "bf16" else 64)) * 2048


def _block_bytes(group: int) -> int:
    steps = max(1, group // 64)
    return 64 * max(1, 64 // group) + 1024 * steps


def _matrix(name: str, strips: Tensor, count: int, scales: Tensor | None) -> dict[str, Tensor]:
    """Parts of shape [count, 2, 16, ...], the last axis being inputs or groups."""
    if name == "bf16":
        tiles = strips.view(torch.bfloat16).view(count, -1, TILES, 16, COLUMNS, 2)
        return {"weight": tiles.permute(0, 2, 4, 1, 3, 5).flatten(3)}
    if scales is None:
        raise AssertionError("a quantised format has scales")
    if name == "int8":
        tiles = strips.view(torch.int8).view(count, -1, TILES, 16, COLUMNS, 4)
        return {"qweight": tiles.permute(0, 2, 4, 1, 3, 5).flatten(3), "row_scale": scales}
    group = INT4_GROUPS[name]
    steps, headers = max(1, group // 64), max(1, 64 // group)
    blocks = strips.view(count, -1, _block_bytes(group))
    heads, codes = blocks.split([64 * headers, 1024 * steps], dim=-1)
    # [count, blocks, headers, (s, z), tile, column] -> [count, tile, column, (s, z), groups]
    both = heads.reshape(count, -1, headers, 2, TILES, COLUMNS).permute(0, 4, 5, 3, 1, 2).flatten(4)
    # [count, blocks, steps, tile, line, column, 4] -> [count, tile, column, blocks, steps, half, line, 4]
    lines = codes.reshape(count, -1, steps, TILES, 8, COLUMNS, 4).permute(0, 3, 5, 1, 2, 4, 6)
    q = torch.stack((lines & 15, lines >> 4), dim=5).flatten(3)
    pairs = q[..., 0::2] | q[..., 1::2] << 4
    return {
        "qweight": pairs,
        "group_scale": both[:, :, :, 0],
        "group_zero": both[:, :, :, 1],
        "row_scale": scales,
    }


def _weights(form: str, parts: dict[str, Tensor], k: int, name: str) -> LinearWeights:
    if form == "int4":
        groups = -(-k // INT4_GROUPS[name])
        width = {"qweight": groups * INT4_GROUPS[name] // 2, "group_scale": groups, "group_zero": groups}
    else:
        width = {"weight": k, "qweight": k}
    cut = {key: (p[:, : width[key]] if key in width else p).contiguous() for key, p in parts.items()}
    return LinearWeights("expert", k, form, cut)


def unpacked(blob: Tensor, name: str, hidden: int, inner: int) -> tuple[Tensor, Tensor]:
    """blob uint8 on the host -> gate and up stacked, [2 I, H], and down, [H, I], float32."""
    gate, up, down = (torch.from_numpy(m) for m in _kernels.unpack_expert(name, blob.numpy(), hidden, inner))
    return torch.cat((gate, up)), down


def _dequantised(blob: Tensor, name: str, hidden: int, inner: int, device: torch.device) -> ExpertCodes:
    return ExpertCodes(
        *(
            LinearWeights(
                "expert", w.shape[1], "float", {"weight": w.to(device=device, dtype=torch.bfloat16)}
            )
            for w in unpacked(blob, name, hidden, inner)
        )
    )


def expert_device_bytes(name: str, hidden: int, inner: int) -> int:
    """Bytes of an expert's codes on a device, from sizes alone."""
    total = 0
    for n, k in ((2 * inner, hidden), (hidden, inner)):
        if name in INT4_GROUPS:
            groups = -(-k // INT4_GROUPS[name])
            total += n * (groups * INT4_GROUPS[name] // 2 + 2 * groups + 4)
        else:
            total += n * (k + 4) if name == "int8" else 2 * n * k
    return total
