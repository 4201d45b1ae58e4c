"""One hostile file per rule of the safetensors header; each refusal says which rule."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.safetensors_file import MAX_HEADER_BYTES, read_header
from tests.forge import safetensors_bytes


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def image(**tensors: Any) -> bytes:
    return safetensors_bytes(tensors, bytes(8))


def text_image(text: str) -> bytes:
    return safetensors_bytes(text.encode("utf-8", "surrogatepass"), bytes(8))


ONE = json.dumps(entry())
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "expected at least 8"),
    "seven bytes": (bytes(7), "expected at least 8"),
    "length zero": (bytes(8), "header of 0 bytes"),
    "length over the file": (safetensors_bytes({}, length=100), "header of 100 bytes in a file of 10 bytes"),
    "length over 100 MB": (safetensors_bytes({}, length=MAX_HEADER_BYTES + 1), "expected at most 100000000"),
    "length all ones": (safetensors_bytes({}, length=2**64 - 1), "expected at most 100000000"),
    "space before the brace": (safetensors_bytes(b" {}"), "must start with '{'"),
    "a list": (safetensors_bytes(b"[]"), "must start with '{'"),
    "not JSON": (safetensors_bytes(b"{]"), "not valid JSON"),
    "cut JSON": (safetensors_bytes(b'{"a":'), "not valid JSON"),
    "bytes after the JSON": (safetensors_bytes(b"{}{}"), "not valid JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff":1}'), "not UTF-8 at byte 2"),
    "nested deeply": (safetensors_bytes(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "number of 5000 digits": (text_image('{"a": %s}' % ("9" * 5000)), "not valid JSON"),
    "duplicate tensor": (text_image(f'{{"a": {ONE}, "a": {ONE}}}'), "duplicate key 'a'"),
    "duplicate dtype": (text_image('{"a": {"dtype": "F32", "dtype": "F16"}}'), "duplicate key 'dtype'"),
    "NaN": (text_image('{"a": NaN}'), "number NaN is not JSON"),
    "infinite number": (text_image('{"a": 1e999}'), "does not fit a float"),
    "metadata of numbers": (image(__metadata__={"a": 1}), "__metadata__ must be an object of strings"),
    "metadata a list": (image(__metadata__=[]), "__metadata__ must be an object of strings"),
    "tensor a number": (image(a=1), "expected an object of dtype, shape and data_offsets"),
    "missing shape": (image(a={"dtype": "F32", "data_offsets": [0, 8]}), "expected an object of dtype"),
    "extra key": (image(a=entry(strides=[1])), "expected an object of dtype"),
    "unknown dtype": (image(a=entry("Q4")), "unknown dtype 'Q4'"),
    "dtype a list": (image(a=entry(["F32"])), "unknown dtype"),
    "negative dimension": (image(a=entry(shape=[-2])), "shape must be at most 16 non-negative integers"),
    "two negative dimensions": (image(a=entry(shape=[-1, -2])), "shape must be at most 16 non-negative"),
    "boolean dimension": (image(a=entry(shape=[True, 2])), "shape must be at most 16 non-negative integers"),
    "float dimension": (image(a=entry(shape=[2.0])), "shape must be at most 16 non-negative integers"),
    "text dimension": (image(a=entry(shape=["2"])), "shape must be at most 16 non-negative integers"),
    "shape a number": (image(a=entry(shape=2)), "shape must be at most 16 non-negative integers"),
    "seventeen dimensions": (image(a=entry(shape=[1] * 16 + [2])), "shape must be at most 16"),
    "dimension over 63 bits": (image(a=entry(shape=[2**63])), "shape must be at most 16 non-negative"),
    "product overflows": (image(a=entry(shape=[2**32, 2**32])), "overflows 63 bits"),
    "product wraps to 8 bytes": (image(a=entry(shape=[2**62, 4, 2])), "overflows 63 bits"),
    "overflow behind a zero": (image(a=entry(shape=[0, 2**62, 2**62], offsets=[0, 0])), "overflows 63 bits"),
    "negative offset": (image(a=entry(offsets=[-8, 0])), "data_offsets must be two non-negative integers"),
    "boolean offset": (image(a=entry(offsets=[False, 8])), "data_offsets must be two non-negative integers"),
    "float offset": (image(a=entry(offsets=[0.0, 8])), "data_offsets must be two non-negative integers"),
    "one offset": (image(a=entry(offsets=[8])), "data_offsets must be two non-negative integers"),
    "three offsets": (image(a=entry(offsets=[0, 8, 8])), "data_offsets must be two non-negative integers"),
    "begin beyond end": (image(a=entry(offsets=[8, 0])), "begin 8 is beyond end 0"),
    "fewer bytes than the shape": (image(a=entry(shape=[3])), "is 12 bytes, data_offsets span 8"),
    "more bytes than the shape": (image(a=entry(shape=[1])), "is 4 bytes, data_offsets span 8"),
    "hole at the start": (image(a=entry(shape=[1], offsets=[4, 8])), "leaves a hole before it"),
    "hole between": (
        image(a=entry("U8", offsets=[0, 2]), b=entry("U8", offsets=[6, 8])),
        "'b' leaves a hole before it: data begins at 6, expected 2",
    ),
    "overlap": (
        image(a=entry("U8", [6], [0, 6]), b=entry("U8", [4], [4, 8])),
        "'b' overlaps the tensor before it: data begins at 4, expected 6",
    ),
    "same bytes twice": (image(a=entry(), b=entry()), "overlaps the tensor before it"),
    "data beyond the file": (image(a=entry(shape=[4], offsets=[0, 16])), "truncated"),
    "bytes after the data": (image(a=entry(shape=[1], offsets=[0, 4])), "bytes that belong to no tensor"),
    "data without tensors": (safetensors_bytes({}, bytes(8)), "bytes that belong to no tensor"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_refuses(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "hostile.safetensors"
    file.write_bytes(data)
    with pytest.raises(CorruptFileError) as caught:
        read_header(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_messages_can_be_printed_whatever_the_name(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(text_image('{"\\ud800\\u0000": 1}'))
    with pytest.raises(CorruptFileError) as caught:
        read_header(file)
    str(caught.value).encode("utf-8")


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="No such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(InvalidInputError, match="not a regular file"):
        read_header(tmp_path)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InvalidInputError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")


def test_accepts_the_corners(tmp_path: Path) -> None:
    """Padding after the JSON, no tensors, zero dimensions, scalars, any order of keys."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors_bytes(b'{"__metadata__":{"format":"pt"}}   '))
    assert read_header(file).metadata == {"format": "pt"}
    tensors = {"b": entry("U8", [], [1, 2]), "z": entry("F32", [0, 7], [1, 1]), "a": entry("I8", [1], [0, 1])}
    file.write_bytes(safetensors_bytes(tensors, bytes(2)))
    header = read_header(file)
    assert list(header.tensors) == ["a", "z", "b"]
    assert header.tensors["z"].bytes == 0
    assert header.tensors["b"].shape == ()
