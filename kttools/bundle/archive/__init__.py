"""Bundles as archive files: a tar in zstd frames with an index. docs/archive.md is the format."""

from .members import matching
from .pack import DEFAULT_LEVEL, MAX_LEVEL, Packed, Packer
from .reader import Archive
from .unpack import Unpacked, Unpacker

__all__ = [
    "DEFAULT_LEVEL",
    "MAX_LEVEL",
    "Archive",
    "Packed",
    "Packer",
    "Unpacked",
    "Unpacker",
    "matching",
]
