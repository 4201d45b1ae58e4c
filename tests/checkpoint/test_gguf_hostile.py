"""One hostile GGUF file per rule of the parser; each refusal says which rule and ends with exit status 3."""

import os
import re
import struct
from pathlib import Path

import pytest

from kttools.checkpoint.gguf.header import MAX_HEADER_BYTES, read_gguf_header
from kttools.checkpoint.gguf.splits import open_files
from kttools.cli import main
from kttools_runtime.errors import CorruptFileError, InvalidInputError

from .gguf_forge import ARRAY, BOOL, F32, F64, STRING, U16, U32, U64, Image, Tensor, deepseek2, text

GOOD = Tensor("a")
HUGE = 2**63


def array(kind: int, length: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + body


HOSTILE: dict[str, tuple[Image, str]] = {
    "empty file": (Image(cut=0), "0 bytes, expected at least 24"),
    "cut header": (Image(cut=20), "20 bytes, expected at least 24"),
    "other magic": (Image(magic=b"GGML"), "expected b'GGUF', got b'GGML'"),
    "version 1": (Image(version=1, tail=bytes(8)), "version 1, expected 2 or 3"),
    "version 4": (Image(version=4), "version 4, expected 2 or 3"),
    "big-endian": (Image(version=3 << 24), "a big-endian file"),
    "more tensors than bytes": (Image(tensor_count=10**6), "1000000 tensors, at most 0 possible"),
    "tensor count negative": (Image(tensor_count=2**64 - 1), "18446744073709551615 tensors, at most"),
    "tensor count wraps": (Image(tensor_count=2**59), "tensors, at most 0 possible"),
    "more pairs than bytes": (Image(pair_count=100), "100 key-value pairs, at most 0 possible"),
    "pair count all ones": (Image(pair_count=2**64 - 1), "key-value pairs, at most"),
    "fewer tensors than said": (Image(tensors=[GOOD], tensor_count=2), "bytes|dimensions|type|expected"),
    "key beyond the file": (Image([("a" * 70000, U32, 1)]), "key of 70000 bytes, expected at most 65535"),
    "key length all ones": (Image(pair_count=1, tail=b"\xff" * 40), "key of 18446744073709551615 bytes"),
    "key cut": (Image(pair_count=1, tail=text("x", 60) + bytes(8)), "60 bytes expected, the file ends"),
    "key not UTF-8": (Image([(b"\xff\xfe", U32, 1)]), "key is not UTF-8 at its byte 0"),
    "duplicate key": (Image([("a", U32, 1), ("a", U32, 1)]), "duplicate key 'a'"),
    "unknown value type": (Image([("a", 13, b"\0" * 8)]), "value of 'a': unknown type 13"),
    "value type negative": (Image([("a", 2**32 - 1, b"\0" * 8)]), "unknown type 4294967295"),
    "value cut": (Image([("a", U64, 1)], cut=40), "8 bytes expected, the file ends"),
    "string length all ones": (
        Image(pair_count=1, tail=text("a") + struct.pack("<I", STRING) + b"\xff" * 8),
        "value of 'a' of 18446744073709551615 bytes",
    ),
    "string beyond the file": (Image([("a", 7, b"")], tail=b""), "1 bytes expected, the file ends"),
    "string not UTF-8": (Image([("a", STRING, b"\xc3\x28")]), "value of 'a' is not UTF-8"),
    "boolean of 2": (Image([("a", BOOL, 2)]), "a boolean must be 0 or 1, got 2"),
    "NaN": (Image([("a", F32, float("nan"))]), "nan is not a finite number"),
    "infinite double": (Image([("a", F64, float("inf"))]), "inf is not a finite number"),
    "array of arrays": (Image([("a", ARRAY, array(ARRAY, 1, bytes(32)))]), "arrays of arrays are not read"),
    "array of unknown": (Image([("a", ARRAY, array(99, 1, bytes(32)))]), "unknown type 99"),
    "array length all ones": (
        Image([("a", ARRAY, array(U32, 2**64 - 1, bytes(32)))]),
        "array of 18446744073709551615 elements, at most 8",
    ),
    "array length wraps": (Image([("a", ARRAY, array(U64, 2**61, bytes(32)))]), "at most 4 possible"),
    "array of strings too long": (Image([("a", ARRAY, array(STRING, 9, bytes(32)))]), "at most 4 possible"),
    "array cut": (Image([("a", ARRAY, array(STRING, 3, text("x") * 2 + bytes(7)))]), "the file ends after"),
    "array boolean": (Image([("a", ARRAY, array(BOOL, 2, b"\1\7"))]), "must be 0 or 1, got 7"),
    "alignment 0": (Image([("general.alignment", U32, 0)]), "must be a power of two"),
    "alignment 24": (Image([("general.alignment", U32, 24)]), "must be a power of two"),
    "alignment 2^31": (Image([("general.alignment", U32, 2**31)]), "must be a power of two"),
    "alignment a string": (Image([("general.alignment", STRING, "32")]), "must be a power of two"),
    "name of 65 bytes": (Image(tensors=[Tensor("a" * 65)]), "tensor name of 65 bytes, expected at most 64"),
    "name not UTF-8": (Image(tensors=[Tensor(b"\x80")]), "tensor name is not UTF-8"),
    "no dimensions": (Image(tensors=[Tensor("a", ())]), "0 dimensions, expected 1 to 4"),
    "five dimensions": (Image(tensors=[Tensor("a", (32, 1, 1, 1, 1))]), "5 dimensions, expected 1 to 4"),
    "2^32 - 1 dimensions": (Image(tensors=[Tensor("a", n_dims=2**32 - 1)]), "4294967295 dimensions"),
    "dimension 0": (Image(tensors=[Tensor("a", (32, 0))]), "must be at least 1"),
    "dimension negative": (Image(tensors=[Tensor("a", (32, -1))]), r"must be at least 1 and below 2\^63"),
    "dimension 2^63": (Image(tensors=[Tensor("a", (HUGE,))]), r"must be at least 1 and below 2\^63"),
    "product wraps to 0": (Image(tensors=[Tensor("a", (2**32, 2**32))]), "bytes, the file has"),
    "product wraps to 32": (Image(tensors=[Tensor("a", (2**62 + 8, 4))]), "bytes, the file has"),
    "bytes wrap": (Image(tensors=[Tensor("a", (2**61,), 28)]), "bytes, the file has"),
    "dims larger than data": (Image(tensors=[Tensor("a", (32, 4))]), "truncated|the file has"),
    "unknown ggml type": (Image(tensors=[Tensor("a", kind=99)]), "unknown ggml type 99"),
    "removed ggml type": (Image(tensors=[Tensor("a", kind=4)]), "unknown ggml type 4"),
    "negative ggml type": (Image(tensors=[Tensor("a", kind=-1)]), "unknown ggml type 4294967295"),
    "row not of whole blocks": (
        Image(tensors=[Tensor("a", (48,), 8)]),
        "Q8_0 needs rows of a multiple of 32",
    ),
    "row of K not of 256": (
        Image(tensors=[Tensor("a", (128, 2), 12)]),
        "Q4_K needs rows of a multiple of 256",
    ),
    "duplicate tensor": (Image(tensors=[GOOD, GOOD]), "duplicate tensor 'a'"),
    "overlap": (Image(tensors=[GOOD, Tensor("b", offset=64)]), "'b' overlaps the tensor before it"),
    "same place": (Image(tensors=[GOOD, Tensor("b", offset=0)]), "overlaps the tensor before it"),
    "hole": (Image(tensors=[GOOD, Tensor("b", offset=160)], tail=bytes(32)), "'b' leaves a hole behind"),
    "first tensor not at 0": (Image(tensors=[Tensor("a", offset=32)], tail=bytes(32)), "leaves a hole"),
    "offset out of the file": (Image(tensors=[Tensor("a", offset=2**40)]), "leaves a hole"),
    "offset all ones": (Image(tensors=[Tensor("a", offset=-1)]), "leaves a hole"),
    "offset wraps": (Image(tensors=[GOOD, Tensor("b", offset=2**64 - 128)]), "leaves a hole"),
    "offset not aligned": (Image(tensors=[Tensor("a", offset=4)], tail=bytes(4)), "leaves a hole"),
    "data cut": (Image(tensors=[GOOD, Tensor("b")], cut=-33), "the file has|truncated"),
    "bytes at the end": (Image(tensors=[GOOD], tail=bytes(33)), "bytes that belong to no tensor"),
    "bytes without tensors": (Image(tail=bytes(100)), "bytes that belong to no tensor"),
}


@pytest.mark.parametrize(("image", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_file(tmp_path: Path, image: Image, message: str) -> None:
    file = image.save(tmp_path / "x.gguf")
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_gguf_header(file)
    assert str(caught.value).startswith(str(file))
    assert caught.value.exit_code == 3


def test_sound_files_pass(tmp_path: Path) -> None:
    """The forge's honest files are read: what is refused above is the lie."""
    for version in (2, 3):
        image = Image([("a", U32, 7)], [GOOD, Tensor("b", (4, 8))], version=version)
        header = read_gguf_header(image.save(tmp_path / "x.gguf"))
        assert header.version == version
        assert header.metadata.integer("a") == 7
        assert header.tensors["b"].shape == (8, 4)
        assert header.tensors["b"].offset % 32 == 0
    wide = Image([("general.alignment", U32, 4096)], [GOOD, Tensor("b")], alignment=4096)
    assert read_gguf_header(wide.save(tmp_path / "x.gguf")).tensors["b"].offset == 8192


def test_a_header_beyond_the_limit(tmp_path: Path) -> None:
    """A file with holes: the limit, not the file's length, ends the reading."""
    file = tmp_path / "x.gguf"
    with file.open("wb") as stream:
        pairs = 5
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, 0, pairs))
        for number in range(pairs):
            stream.write(text(f"k{number}") + struct.pack("<I", STRING) + struct.pack("<Q", 16 << 20))
            stream.seek(16 << 20, os.SEEK_CUR)
        stream.truncate()
    assert file.stat().st_size > MAX_HEADER_BYTES
    with pytest.raises(CorruptFileError, match=f"header larger than {MAX_HEADER_BYTES} bytes"):
        read_gguf_header(file)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(InvalidInputError, match="not a regular file"):
        read_gguf_header(tmp_path / "pipe.gguf")
    with pytest.raises(InvalidInputError, match="No such file"):
        read_gguf_header(tmp_path / "none.gguf")


def split(number: int, count: int, tensors: list[Tensor], total: int | None = None) -> Image:
    pairs = [("split.no", U16, number), ("split.count", U16, count)]
    if total is not None:
        pairs.append(("split.tensors.count", U32, total))
    return Image(pairs, tensors)


SPLITS: dict[str, tuple[list[Image], str]] = {
    "no numbers": ([Image([], [GOOD]), Image([], [Tensor("b")])], "split.count: expected 2 .* got None"),
    "count differs": (
        [split(0, 2, [GOOD]), split(1, 3, [Tensor("b")])],
        "split.count: expected 2 by the files' names, got 3",
    ),
    "numbers swapped": ([split(1, 2, [GOOD]), split(0, 2, [Tensor("b")])], "split.no: expected 0 .* got 1"),
    "number twice": ([split(0, 2, [GOOD]), split(0, 2, [Tensor("b")])], "split.no: expected 1 .* got 0"),
    "tensor in both": ([split(0, 2, [GOOD]), split(1, 2, [GOOD])], "tensor 'a' is also in m-00001"),
    "total too large": (
        [split(0, 2, [GOOD], 5), split(1, 2, [Tensor("b")])],
        "split.tensors.count 5, the files hold 2",
    ),
    "one of two": ([split(0, 2, [GOOD])], "1 of 2 splits missing, first m-00002-of-00002.gguf"),
    "number a string": (
        [Image([("split.no", STRING, "0"), ("split.count", U16, 2)], [GOOD]), split(1, 2, [Tensor("b")])],
        "split.no must be an integer",
    ),
}


@pytest.mark.parametrize(("images", "message"), SPLITS.values(), ids=SPLITS.keys())
def test_hostile_splits(tmp_path: Path, images: list[Image], message: str) -> None:
    for number, image in enumerate(images, 1):
        image.save(tmp_path / f"m-{number:05d}-of-00002.gguf")
    for path in (tmp_path, tmp_path / "m-00001-of-00002.gguf"):
        with pytest.raises(InvalidInputError, match=message) as caught:
            open_files(path)
        assert caught.value.exit_code == 3


def test_splits_read_as_one(tmp_path: Path) -> None:
    images = [split(0, 2, [GOOD], 2), split(1, 2, [Tensor("b")])]
    for number, image in enumerate(images, 1):
        image.save(tmp_path / f"m-{number:05d}-of-00002.gguf")
    for path in (tmp_path, *sorted(tmp_path.glob("*"))):
        found = open_files(path)
        assert list(found.tensors) == ["a", "b"]
        assert [file.name for file in found.files] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    Image([], [GOOD]).save(tmp_path / "other.gguf")
    with pytest.raises(InvalidInputError, match=r"holds 2 GGUF models .* name one file"):
        open_files(tmp_path)


MODELS: dict[str, tuple[Image, str]] = {
    "no architecture": (deepseek2(**{"general.architecture": ...}), "required key general.architecture"),
    "other architecture": (
        deepseek2(**{"general.architecture": (STRING, "clip")}),
        "general.architecture 'clip' is not supported; supported: deepseek2",
    ),
    "architecture a number": (deepseek2(**{"general.architecture": (U32, 1)}), "must be a string, got 1"),
    "no layers": (deepseek2(**{"deepseek2.block_count": (U32, 0)}), "num_hidden_layers must be"),
    "2^32 - 1 layers": (
        deepseek2(**{"deepseek2.block_count": (U32, 2**32 - 1)}),
        "num_hidden_layers must be",
    ),
    "layers an array": (
        deepseek2(**{"deepseek2.block_count": (ARRAY, (U32, [2]))}),
        "deepseek2.block_count must be an integer",
    ),
    "more experts than stored": (
        deepseek2(**{"deepseek2.expert_count": (U32, 64)}),
        r"expected shape \[64, 32\]|expected shape \[64",
    ),
    "other hidden size": (deepseek2(**{"deepseek2.embedding_length": (U32, 64)}), "expected shape"),
    "heads that do not fit": (deepseek2(**{"deepseek2.attention.head_count": (U32, 3)}), "do not fit"),
    "no heads": (deepseek2(**{"deepseek2.attention.head_count": (U32, 0)}), "do not fit"),
    "epsilon 0": (
        deepseek2(**{"deepseek2.attention.layer_norm_rms_epsilon": (F32, 0.0)}),
        "rms_norm_eps must be",
    ),
    "unknown gating": (deepseek2(**{"deepseek2.expert_gating_func": (U32, 9)}), "expert_gating_func 9"),
    "groups that do not divide": (
        deepseek2(**{"deepseek2.expert_group_count": (U32, 3)}),
        "n_group must be a divisor",
    ),
    "bos beyond the vocabulary": (
        deepseek2(**{"tokenizer.ggml.bos_token_id": (U32, 100)}),
        "bos_token_id 100 is not one of 100 tokens",
    ),
    "token twice": (
        deepseek2(**{"tokenizer.ggml.tokens": (ARRAY, (STRING, ["a"] * 100))}),
        "names a token twice",
    ),
    "types of other length": (
        deepseek2(**{"tokenizer.ggml.token_type": (ARRAY, (U32, [1]))}),
        "token_type has 1 of 100 entries",
    ),
    "types of floats": (
        deepseek2(**{"tokenizer.ggml.token_type": (ARRAY, (F32, [1.0] * 100))}),
        "must be an array of integers",
    ),
    "merge of strangers": (
        deepseek2(**{"tokenizer.ggml.merges": (ARRAY, (STRING, ["t h", "x y"]))}),
        r"merges\[1\] 'x y' is no pair of tokens",
    ),
    "merge of one": (
        deepseek2(**{"tokenizer.ggml.merges": (ARRAY, (STRING, ["th"]))}),
        r"merges\[0\] 'th' is no pair of tokens",
    ),
    "unknown pre-tokenizer": (
        deepseek2(**{"tokenizer.ggml.pre": (STRING, "newest")}),
        "tokenizer.ggml.pre 'newest' is not known",
    ),
    "yarn without factor": (
        deepseek2(**{"deepseek2.rope.scaling.type": (STRING, "yarn")}),
        "required key deepseek2.rope.scaling.factor",
    ),
    "vocabulary only": (Image(deepseek2().pairs), "holds no tensors"),
}


@pytest.mark.parametrize(("image", "message"), MODELS.values(), ids=MODELS.keys())
def test_hostile_model(
    tmp_path: Path, image: Image, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: exit status 3, one line, no traceback, nothing written."""
    file = image.save(tmp_path / "x.gguf")
    code = main(["quantize", str(file), "-o", str(tmp_path / "out"), "--quiet"])
    error = capsys.readouterr().err
    assert code == 3, error
    assert error.count("\n") == 1
    assert error.startswith("kttools: error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
