"""Archives put together byte by byte after docs/archive.md, lies included; no code of writer or reader."""

import hashlib
import io
import itertools
import struct
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
import zstandard

FRAME = 1 << 20


def zstd(content: bytes, **changes: Any) -> bytes:
    """A frame as an archive wants it, or with other parameters."""
    options = {"write_content_size": True, "write_checksum": True, "source_size": FRAME} | changes
    level = options.pop("level", 1)
    size = -1 if not options["write_content_size"] else len(content)
    parameters = zstandard.ZstdCompressionParameters.from_level(level, **options)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=size)
    return bytes(packer.compress(content) + packer.flush())


def skippable(magic: int, content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<II", magic, len(content) if length is None else length) + content


@dataclass
class Image:
    """One part. members: (name, bytes); contents and packed: its frames. lies: see field()."""

    members: list[tuple[bytes, int]]
    contents: list[bytes]
    packed: list[bytes]
    identity: bytes
    part: int = 1
    parts: int = 1
    first_frame: int = 0
    lies: dict[str, Any] = field(default_factory=dict)

    def field(self, name: str, value: Any) -> Any:
        """The lie about a field, or the truth."""
        return self.lies.get(name, value)

    def repack(self, number: int, content: bytes) -> None:
        """Another content for a frame, its compressed form and hash to match."""
        self.contents[number], self.packed[number] = content, zstd(content)

    def table(self) -> bytes:
        truth = b"".join(struct.pack("<QH", size, len(name)) + name for name, size in self.members)
        return bytes(self.field("table", truth))

    def index(self) -> bytes:
        hashes = [xxhash.xxh3_64_intdigest(content) for content in self.contents]
        hashes = self.field("hashes", hashes)
        table = self.table()
        total = 1 + sum(1 + -(-size // FRAME) for _, size in self.members)
        head = struct.pack(
            "<8sIIIIQQQ32sII",
            self.field("magic", b"KTARCHIV"),
            self.field("version", 1),
            self.part,
            self.parts,
            self.field("num_members", len(self.members)),
            self.first_frame,
            self.field("num_frames", len(self.packed)),
            self.field("total_frames", total),
            self.identity,
            self.field("frame_bytes", FRAME),
            self.field("table_bytes", len(table)),
        )
        rest = table + b"".join(struct.pack("<Q", value) for value in hashes)
        checksum = xxhash.xxh3_64_intdigest(head + bytes(8) + rest)
        content = head + struct.pack("<Q", self.field("checksum", checksum)) + rest
        return skippable(self.field("index_magic", 0x184D2A54), content, self.lies.get("index_length"))

    def seek(self, index_bytes: int) -> bytes:
        sizes = [(len(p), len(c)) for p, c in zip(self.packed, self.contents, strict=True)]
        sizes = self.field("sizes", [*sizes, (index_bytes, 0)])
        entries = b"".join(struct.pack("<II", *pair) for pair in sizes)
        footer = struct.pack(
            "<IBI",
            self.field("seek_count", len(sizes)),
            self.field("descriptor", 0),
            self.field("seek_magic", 0x8F92EAB1),
        )
        magic = self.field("seek_frame_magic", 0x184D2A5E)
        return skippable(magic, entries + footer, self.lies.get("seek_length"))

    def bytes(self) -> bytes:
        index = self.index()
        return b"".join(self.packed) + index + self.seek(len(index))


def tar_frames(files: list[tuple[str, bytes]]) -> list[bytes]:
    """A tar of the files as Python's tarfile writes it, cut into frames after the document."""
    stream = io.BytesIO()
    starts = []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
            starts.append(stream.tell() - len(data) - -len(data) % 512)
    whole, frames, end = stream.getvalue(), [], 0
    for start, (_, data) in zip(starts, files, strict=True):
        frames.append(whole[end:start])
        frames += [data[at : at + FRAME] for at in range(0, len(data), FRAME)]
        end = start + len(data)
    return [*frames, whole[end : end + -end % 512 + 1024]]


def of_files(files: list[tuple[str, bytes]]) -> Image:
    """An archive of files; the first one is taken for the manifest."""
    contents = tar_frames(files)
    members = [(name.encode(), len(data)) for name, data in files]
    identity = hashlib.sha256(files[0][1]).digest()
    return Image(members, contents, [zstd(content) for content in contents], identity)


def of_bundle(root: Path) -> Image:
    """bundle.json, its signature, and everything else in order of path."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    first = [name for name in ("bundle.json", "bundle.json.sig") if name in names]
    names = [*first, *(name for name in names if name not in first)]
    return of_files([(name, (root / name).read_bytes()) for name in names])


def cut(image: Image, *ends: int) -> list[Image]:
    """Parts that end before these frames; the last has the rest."""
    borders = [0, *ends, len(image.packed)]
    return [
        Image(
            list(image.members),
            image.contents[begin:end],
            image.packed[begin:end],
            image.identity,
            part=number,
            parts=len(borders) - 1,
            first_frame=begin,
        )
        for number, (begin, end) in enumerate(itertools.pairwise(borders), 1)
    ]
