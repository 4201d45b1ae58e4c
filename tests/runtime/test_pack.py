"""The expert pack: a hostile file for each rule of PACK.md, round trips, the page held against the code."""

import errno
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kttools_runtime import _kernels, pack, pack_writer
from kttools_runtime.errors import InvalidInputError, KTError, PackFormatError, ResourceError, UsageError
from kttools_runtime.pack import (
    EXPERT,
    EXPERT_FIELDS,
    HEADER,
    HEADER_FIELDS,
    BrokenRule,
    PackHeader,
    Rule,
    header_bytes,
    header_checksum,
    map_pack,
    parse_header,
    read_pack_header,
    validate,
    verify_pack,
)
from kttools_runtime.pack_writer import PackWriter, plan_header
from tests.memory import resident_bytes

PAGE = Path(pack.__file__).with_name("PACK.md")
HIDDEN, INNER, LAYER = 64, 32, 3
FORMATS = ("int8", "int4_g64", "bf16")
OFFSETS = {
    name: struct.calcsize("<" + "".join(c for _, c in HEADER_FIELDS[:i]))
    for i, (name, _) in enumerate(HEADER_FIELDS)
}


def write_pack(path: Path, formats: tuple[str, ...] = FORMATS, seed: int = 0) -> list[bytes]:
    """A pack of random blobs; returns them."""
    rng = np.random.default_rng(seed)
    blobs = [rng.bytes(_kernels.expert_bytes(name, HIDDEN, INNER)) for name in formats]
    with PackWriter(
        path, layer=LAYER, hidden_size=HIDDEN, moe_intermediate_size=INNER, formats=formats
    ) as writer:
        for index in reversed(range(len(blobs))):
            writer.write(index, blobs[index])
    return blobs


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "layer-00003.ktpack"
    write_pack(path)
    return path


def seal(data: bytearray, size: int = pack.PAGE_BYTES) -> bytearray:
    """The header checksum made right again, as an attacker would."""
    data[48:56] = header_checksum(bytes(data[:size])).to_bytes(8, "little")
    return data


def set_field(name: str, value: int, sealed: bool = True) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        code = dict(HEADER_FIELDS)[name]
        struct.pack_into("<" + code, data, OFFSETS[name], value)
        return seal(data) if sealed else data

    return change


def set_expert(index: int, name: str, value: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        position = next(i for i, (field, _) in enumerate(EXPERT_FIELDS) if field == name)
        start = HEADER.size + index * EXPERT.size
        entry = list(EXPERT.unpack_from(data, start))
        entry[position] = value
        EXPERT.pack_into(data, start, *entry)
        return seal(data)

    return change


def set_byte(offset: int, value: int, sealed: bool) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[offset] = value
        return seal(data) if sealed else data

    return change


BLOB = 4096
HOSTILE = [
    (Rule.TRUNCATED, lambda data: data[:0], "at least 64"),
    (Rule.TRUNCATED, lambda data: data[:63], "at least 64"),
    (Rule.TRUNCATED, lambda data: data[:64], "header alone has 4096"),
    (Rule.TRUNCATED, lambda data: data[:4095], "header alone has 4096"),
    (Rule.MAGIC, set_byte(0, 0, sealed=True), "not a pack"),
    (Rule.VERSION, set_field("version", 2), "pack version 2"),
    (Rule.VERSION, set_field("version", 0), "pack version 0"),
    (Rule.LIMITS, set_field("num_experts", 0), "num_experts is 0"),
    (Rule.LIMITS, set_field("num_experts", 2**32 - 1), "num_experts is 4294967295"),
    (Rule.LIMITS, set_field("hidden_size", 0), "hidden_size is 0"),
    (Rule.LIMITS, set_field("hidden_size", 2**32 - 1), "hidden_size is 4294967295"),
    (Rule.LIMITS, set_field("moe_intermediate_size", (1 << 20) + 1), "moe_intermediate_size is 1048577"),
    (Rule.LIMITS, set_field("layer", 65536), "layer is 65536"),
    (Rule.HEADER_BYTES, set_field("header_bytes", 8192), "header of 8192 bytes, expected 4096"),
    (Rule.HEADER_BYTES, set_field("header_bytes", 0), "header of 0 bytes"),
    (Rule.HEADER_BYTES, set_field("header_bytes", 2**32 - 1), "header of 4294967295 bytes"),
    (Rule.HEADER_BYTES, set_field("num_experts", 65536), "expected 2101248 for 65536 experts"),
    (Rule.HEADER_CHECKSUM, set_field("hidden_size", 65, sealed=False), "checksum"),
    (Rule.HEADER_CHECKSUM, set_byte(4000, 1, sealed=False), "checksum"),
    (Rule.HEADER_CHECKSUM, set_byte(48, 0, sealed=False), "checksum"),
    (Rule.RESERVED, set_field("reserved_1", 1), "not zero"),
    (Rule.RESERVED, set_field("reserved_2", 1), "not zero"),
    (Rule.RESERVED, set_byte(4095, 1, sealed=True), "not zero"),
    (Rule.RESERVED, set_byte(64 + 3 * 32, 1, sealed=True), "not zero"),
    (Rule.RESERVED, set_expert(1, "reserved", 7), "expert 1: reserved is 7"),
    (Rule.LAYOUT, set_field("layout", 2), "layout 2"),
    (Rule.FORMAT, set_expert(2, "format", 99), "expert 2: unknown format 99"),
    (Rule.FORMAT, set_expert(0, "format", 0), "expert 0: unknown format 0"),
    (Rule.FORMAT, set_expert(1, "format", 6), "expert 1: q4_k holds blocks of 256 inputs"),
    (Rule.FORMAT, set_expert(1, "format", 0x0606), "expert 1: unknown format 1542"),
    (Rule.FORMAT, set_expert(1, "format", 0x0206), "expert 1: unknown format 518"),
    (Rule.FORMAT, set_expert(1, "format", 0x10806), "expert 1: unknown format 67590"),
    (Rule.BLOB_BYTES, set_expert(0, "bytes", 4096), "expert 0: 4096 bytes, expected"),
    (Rule.BLOB_BYTES, set_expert(1, "bytes", 2**64 - 1), "expert 1: 18446744073709551615 bytes"),
    (Rule.BLOB_BYTES, set_field("hidden_size", 1 << 20), "expert 0: 12288 bytes, expected"),
    (Rule.OFFSET, set_expert(0, "offset", 0), "expert 0 begins at 0"),
    (Rule.OFFSET, set_expert(1, "offset", 4096), "expert 1 begins at 4096"),
    (Rule.OFFSET, set_expert(2, "offset", 2**64 - 1), "expert 2 begins at"),
    (Rule.FILE_BYTES, set_field("file_bytes", 2**64 - 1), "file_bytes is 18446744073709551615"),
    (Rule.FILE_BYTES, set_field("file_bytes", 0), "file_bytes is 0"),
    (Rule.FILE_LENGTH, lambda data: data[:-1], "truncated"),
    (Rule.FILE_LENGTH, lambda data: data[:4096], "truncated"),
    (Rule.FILE_LENGTH, lambda data: data + b"\0", "longer than it says"),
]


@pytest.mark.parametrize(("rule", "change", "message"), HOSTILE)
def test_hostile_file_is_refused(
    good: Path, rule: Rule, change: Callable[[bytearray], bytearray], message: str
) -> None:
    good.write_bytes(change(bytearray(good.read_bytes())))
    for reader in (read_pack_header, map_pack, verify_pack):
        with pytest.raises(BrokenRule, match=re.escape(message)) as caught:
            reader(good)
        assert caught.value.rule is rule
        assert isinstance(caught.value, PackFormatError)
        assert caught.value.exit_code == 3
        assert str(good) in str(caught.value)


def test_every_rule_has_a_hostile_file() -> None:
    assert {rule for rule, _, _ in HOSTILE} | {Rule.BLOB_CHECKSUM} == set(Rule)


@pytest.mark.parametrize("offset", [BLOB, BLOB + 12288, -1])
def test_verify_sees_a_flipped_bit_in_any_blob(good: Path, offset: int) -> None:
    data = bytearray(good.read_bytes())
    data[offset] ^= 1
    good.write_bytes(data)
    assert read_pack_header(good).num_experts == 3
    with pytest.raises(BrokenRule, match=r"expert \d: checksum") as caught:
        verify_pack(good)
    assert caught.value.rule is Rule.BLOB_CHECKSUM


def test_truncation_at_every_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.ktpack"
    write_pack(path, ("int8",))
    size = path.stat().st_size
    for length in reversed(range(0, size, 61)):
        os.truncate(path, length)
        with pytest.raises(BrokenRule) as caught:
            map_pack(path)
        assert caught.value.rule in (Rule.TRUNCATED, Rule.FILE_LENGTH)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_mutated_header_is_refused_or_is_the_same(changes: list[tuple[int, int]]) -> None:
    header = plan_header(layer=1, hidden_size=HIDDEN, moe_intermediate_size=INNER, formats=FORMATS)
    original = header_bytes(header)
    data = bytearray(original)
    for offset, value in changes:
        data[offset] = value
    if data == original:
        assert parse_header(bytes(data), "x") == header
    else:
        with pytest.raises(PackFormatError):
            parse_header(bytes(data), "x")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 159), st.integers(0, 255))
def test_a_mutated_header_with_a_right_checksum_never_reads_outside_the_file(offset: int, value: int) -> None:
    header = plan_header(layer=1, hidden_size=HIDDEN, moe_intermediate_size=INNER, formats=FORMATS)
    data = bytearray(header_bytes(header))
    data[offset] = value
    seal(data)
    try:
        found = parse_header(bytes(data), "x")
    except PackFormatError:
        return
    validate(found, "x")
    assert found.experts[-1].offset + found.experts[-1].bytes == found.file_bytes


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(_kernels.FORMATS)), min_size=1, max_size=5),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(0, 65535),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, formats: list[str], hidden: int, inner: int, layer: int
) -> None:
    path = tmp_path_factory.mktemp("pack") / "p.ktpack"
    rng = np.random.default_rng(layer)
    blobs = [rng.bytes(_kernels.expert_bytes(name, hidden, inner)) for name in formats]
    with PackWriter(
        path, layer=layer, hidden_size=hidden, moe_intermediate_size=inner, formats=formats
    ) as writer:
        for index, blob in enumerate(blobs):
            writer.write(index, blob)
    header, views = map_pack(path)
    assert header == verify_pack(path) == writer.header
    assert header.formats == tuple(formats)
    assert (header.layer, header.hidden_size, header.moe_intermediate_size) == (layer, hidden, inner)
    assert header.file_bytes == path.stat().st_size
    for view, blob in zip(views, blobs, strict=True):
        assert view.tobytes() == blob
    for entry, blob in zip(header.experts, blobs, strict=True):
        assert entry.xxh3_64 == xxhash.xxh3_64_intdigest(blob)


def test_views_are_read_only_page_aligned_parts_of_one_mapping(good: Path) -> None:
    header, views = map_pack(good)
    assert all(view.ctypes.data % pack.PAGE_BYTES == 0 and not view.flags.writeable for view in views)
    first = views[0].ctypes.data - header.experts[0].offset
    assert all(v.ctypes.data - e.offset == first for v, e in zip(views, header.experts, strict=True))


def test_a_view_outlives_the_file_name(good: Path) -> None:
    expected = good.read_bytes()[-4096:]
    _, views = map_pack(good)
    good.unlink()
    assert views[-1][-4096:].tobytes() == expected


def test_mapping_does_not_read_the_blobs(tmp_path: Path) -> None:
    """A sparse pack of 64 GiB maps at once and costs no memory."""
    path = tmp_path / "big.ktpack"
    header = plan_header(layer=0, hidden_size=7168, moe_intermediate_size=2048, formats=["int8"] * 1500)
    with path.open("wb") as file:
        file.write(header_bytes(header))
        file.truncate(header.file_bytes)
    before = resident_bytes()
    _, views = map_pack(path)
    assert len(views) == 1500
    assert resident_bytes() - before < 64 << 20


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: os.mkfifo(p)])
def test_no_file_is_invalid_input_without_blocking(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "p.ktpack"
    make(path)
    for reader in (read_pack_header, map_pack, verify_pack):
        with pytest.raises(InvalidInputError, match=r"cannot be read|not a regular file"):
            reader(path)


def test_parse_wants_the_whole_header(good: Path) -> None:
    data = good.read_bytes()
    with pytest.raises(ValueError, match="for a header of 4096"):
        parse_header(data[:8192], "x")


def valid() -> PackHeader:
    return plan_header(layer=1, hidden_size=HIDDEN, moe_intermediate_size=INNER, formats=FORMATS)


def test_the_writer_is_held_to_the_same_rules() -> None:
    header = valid()
    broken = {
        Rule.LIMITS: replace(header, num_experts=2),
        Rule.LAYOUT: replace(header, layout=9),
        Rule.HEADER_BYTES: replace(header, header_bytes=8192),
        Rule.FILE_BYTES: replace(header, file_bytes=1),
        Rule.OFFSET: replace(header, experts=(replace(header.experts[0], offset=1), *header.experts[1:])),
    }
    for rule, bad in broken.items():
        with pytest.raises(BrokenRule) as caught:
            header_bytes(bad)
        assert caught.value.rule is rule


def test_plan_refuses_what_no_pack_can_hold() -> None:
    with pytest.raises(UsageError, match="unknown expert format 'q3'"):
        plan_header(layer=0, hidden_size=8, moe_intermediate_size=8, formats=["q3"])
    with pytest.raises(BrokenRule, match="num_experts is 0"):
        plan_header(layer=0, hidden_size=8, moe_intermediate_size=8, formats=[])
    with pytest.raises(BrokenRule, match="hidden_size is 2097152"):
        plan_header(layer=0, hidden_size=1 << 21, moe_intermediate_size=8, formats=["int8"])


def new_writer(path: Path) -> PackWriter:
    return PackWriter(path, layer=1, hidden_size=HIDDEN, moe_intermediate_size=INNER, formats=["int8"])


BLOB_BYTES = _kernels.expert_bytes("int8", HIDDEN, INNER)


def test_nothing_stands_under_the_name_before_finish(tmp_path: Path) -> None:
    path = tmp_path / "p.ktpack"
    writer = new_writer(path)
    writer.write(0, bytes(BLOB_BYTES))
    (temporary,) = tmp_path.iterdir()
    assert temporary.name.startswith(".")
    with pytest.raises(BrokenRule, match="not a pack"):
        read_pack_header(temporary)  # the header is written last
    writer.finish()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="already finished"):
        writer.finish()
    writer.discard()
    assert path.exists()


def test_writer_refuses_wrong_use_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "p.ktpack"
    with pytest.raises(ValueError, match="expert 0 was not written"), new_writer(path):
        pass
    with pytest.raises(ValueError, match="expected 12288, once"), new_writer(path) as writer:
        writer.write(0, bytes(5))
    with new_writer(path) as writer:
        writer.write(0, bytes(BLOB_BYTES))
        with pytest.raises(ValueError, match="expected 12288, once"):
            writer.write(0, bytes(BLOB_BYTES))
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_pack_stays_when_its_successor_fails(good: Path) -> None:
    before = good.read_bytes()
    with pytest.raises(ValueError, match="expert 0 was not written"), new_writer(good):
        pass
    assert good.read_bytes() == before
    assert list(good.parent.iterdir()) == [good]


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack_writer.os, call, full)
    with pytest.raises(ResourceError, match="disk is full"), new_writer(tmp_path / "p.ktpack") as writer:
        writer.write(0, bytes(BLOB_BYTES))
    assert list(tmp_path.iterdir()) == []


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwrite
    monkeypatch.setattr(pack_writer.os, "pwrite", lambda fd, view, at: original(fd, view[:1000], at))
    blobs = write_pack(tmp_path / "p.ktpack")
    _, views = map_pack(tmp_path / "p.ktpack")
    assert [view.tobytes() for view in views] == blobs


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(KTError, match="cannot be written: Not a directory") as caught:
        new_writer(tmp_path / "file" / "p.ktpack")
    assert caught.value.exit_code == 1


def test_a_file_that_shrinks_while_it_is_verified(good: Path) -> None:
    with pytest.raises(BrokenRule, match="truncated at byte"):
        verify_pack(good, on_bytes=lambda _: os.truncate(good, 4096 + 12288))


def test_packs_do_not_depend_on_who_wrote_them(tmp_path: Path) -> None:
    """Two processes, the second with another hash seed and thread count, write the same bytes."""
    path, other = tmp_path / "a.ktpack", tmp_path / "b.ktpack"
    write_pack(path)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_pack as t; "
    code += f"from pathlib import Path; t.write_pack(Path({str(other)!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "KTTOOLS_CPU_INFER": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert path.read_bytes() == other.read_bytes()


def page_rows(heading: str) -> list[list[str]]:
    section = PAGE.read_text(encoding="ascii").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


CODES = {"u32": "I", "u64": "Q", "8s": "8s"}


@pytest.mark.parametrize(("heading", "fields"), [("Header", HEADER_FIELDS), ("Expert table", EXPERT_FIELDS)])
def test_the_page_has_the_fields_of_the_code(heading: str, fields: tuple[tuple[str, str], ...]) -> None:
    position, expected = 0, []
    for name, code in fields:
        expected.append([str(position), name, code])
        position += struct.calcsize("<" + code)
    assert [[at, name, CODES[kind]] for at, kind, name, _ in page_rows(heading)] == expected


def test_the_page_has_formats_limits_and_rules_of_the_code() -> None:
    listed = {name: int(number) for number, name, _ in page_rows("Formats")}
    uniform = {name: number for name, number in _kernels.BLOCK_FORMATS.items() if number < 256}
    assert listed == _kernels.FORMATS | uniform
    assert [row[0] for row in page_rows("Rules")] == [rule.value for rule in Rule]
    limits = {name: (int(low), int(high)) for name, low, high, _ in page_rows("Limits")}
    assert limits == {
        "num_experts": (1, pack.MAX_EXPERTS),
        "hidden_size": (1, pack.MAX_SIZE),
        "moe_intermediate_size": (1, pack.MAX_SIZE),
        "layer": (0, pack.MAX_LAYER),
    }
    assert OFFSETS["header_xxh3_64"] == pack.CHECKSUM_OFFSET


def test_the_example_of_the_page_is_what_the_writer_writes(tmp_path: Path) -> None:
    lines = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?){16})$", PAGE.read_text(encoding="ascii"), re.M)
    assert [int(at, 16) for at, _ in lines] == list(range(0, 128, 16))
    shown = bytes.fromhex("".join(row for _, row in lines))
    path = tmp_path / "p.ktpack"
    with PackWriter(
        path, layer=3, hidden_size=64, moe_intermediate_size=32, formats=["int8", "int8"]
    ) as writer:
        for expert in range(2):
            writer.write(expert, bytes([expert]) * BLOB_BYTES)
    data = path.read_bytes()
    assert data[:128] == shown
    assert not any(data[128:4096])
    assert len(data) == 0x7000
