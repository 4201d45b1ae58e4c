"""One zstd frame: made so that the same content gives the same bytes, read as hostile input."""

import threading
from functools import lru_cache

import xxhash
import zstandard

from kttools_runtime.errors import CorruptFileError

from .layout import FRAME_BYTES

MAGIC = 0xFD2FB528.to_bytes(4, "little")
STORED_BLOCK = 128 << 10  # the largest block of the zstd format
PROBE_BYTES = 32 << 10
# A frame that would shrink by less than a fiftieth is stored: it is read again at the speed of memory.
WORTHWHILE = 0.98
_local = threading.local()


def encode_frame(data: bytes, level: int) -> bytes:
    """A whole zstd frame with content size and checksum. level 0: stored. Same input, same bytes."""
    if level == 0 or (len(data) > 4 * PROBE_BYTES and not _is_worthwhile(_probe(data), 1)):
        return store_frame(data)
    packed: bytes = _compressor(level).compress(data)
    return packed if len(packed) <= WORTHWHILE * len(data) else store_frame(data)


def store_frame(data: bytes) -> bytes:
    """`data` in raw blocks: what zstd makes of noise, without the search."""
    descriptor = 0b10_1_0_0_1_00  # 4-byte content size, single segment, checksum, no dictionary
    pieces = [MAGIC, bytes([descriptor]), len(data).to_bytes(4, "little")]
    for start in range(0, max(len(data), 1), STORED_BLOCK):
        block = data[start : start + STORED_BLOCK]
        is_last = start + STORED_BLOCK >= len(data)
        pieces += [(len(block) << 3 | is_last).to_bytes(3, "little"), block]
    pieces.append((xxhash.xxh64_intdigest(data) & 0xFFFFFFFF).to_bytes(4, "little"))
    return b"".join(pieces)


def decode_frame(packed: bytes, expected_bytes: int, where: str) -> bytes:
    """The content of exactly one frame. Memory is taken for expected_bytes and no more.

    Raises CorruptFileError for anything but a frame that declares this size, a window within it, no
    dictionary and a checksum, and keeps its word. where: opens the message.
    """
    if packed[:4] != MAGIC:
        raise CorruptFileError(f"{where}: not a zstd frame")
    try:
        header = zstandard.get_frame_parameters(packed)
        problem = _header_problem(header, expected_bytes)
        if problem:
            raise CorruptFileError(f"{where}: {problem}")
        content: bytes = _decompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptFileError(f"{where}: damaged zstd frame ({error})") from None
    if len(content) != expected_bytes:
        raise CorruptFileError(f"{where}: {len(content)} bytes of content, expected {expected_bytes}")
    return content


def _header_problem(header: zstandard.FrameParameters, expected_bytes: int) -> str | None:
    if header.content_size != expected_bytes:
        return f"the frame declares {header.content_size} bytes of content, expected {expected_bytes}"
    if header.window_size > FRAME_BYTES:
        return f"the frame wants a window of {header.window_size} bytes, expected at most {FRAME_BYTES}"
    if header.dict_id:
        return f"the frame wants dictionary {header.dict_id}, expected none"
    return None if header.has_checksum else "the frame has no checksum"


def _probe(data: bytes) -> bytes:
    """A piece each of the front, the middle and the end: blobs of one frame may differ."""
    last = len(data) - PROBE_BYTES
    return b"".join(data[start : start + PROBE_BYTES] for start in (0, last // 2, last))


def _is_worthwhile(data: bytes, level: int) -> bool:
    return len(_compressor(level).compress(data)) <= WORTHWHILE * len(data)


@lru_cache(maxsize=32)
def _parameters(level: int) -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters.from_level(
        level, source_size=FRAME_BYTES, write_content_size=True, write_checksum=True, write_dict_id=False
    )


def _compressor(level: int) -> zstandard.ZstdCompressor:
    """This thread's compressor of the level; contexts are large and not to be shared."""
    made: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in made:
        made[level] = zstandard.ZstdCompressor(compression_params=_parameters(level))
    return made[level]


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=FRAME_BYTES)
    return _local.decompressor
