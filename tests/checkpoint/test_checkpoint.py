"""Tensors of single files and shards, against the safetensors library; hostile indexes; bounded memory."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from kttools.checkpoint import Checkpoint, open_checkpoint
from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.safetensors_file import DTYPES
from tests.forge import save, save_sharded

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4).to(torch.bfloat16),
    "b": torch.arange(5, dtype=torch.float32),
    "c": torch.full((2, 1, 3), -1.5, dtype=torch.float16),
    "empty": torch.empty(0, 4, dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.uint8),
}
INDEX = "model.safetensors.index.json"


def test_single_file(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", TENSORS)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.names()) == set(TENSORS)
        assert checkpoint.index_file is None
        for name, tensor in TENSORS.items():
            got = checkpoint.read(name)
            assert got.dtype == tensor.dtype
            assert torch.equal(got, tensor)
        assert checkpoint.info("c").shape == (2, 1, 3)
        assert checkpoint.info("c").bytes == 12


@pytest.mark.parametrize("digits", [5, 6])
def test_shards(tmp_path: Path, digits: int) -> None:
    save_sharded(tmp_path, TENSORS, 3, digits)
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.files) == 3
    assert checkpoint.files[2].name == f"model-00003-of-{3:0{digits}d}.safetensors"
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())
    assert Checkpoint.open(tmp_path / INDEX).names() == checkpoint.names()


def test_every_dtype_of_the_library(tmp_path: Path) -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 3.0])
    readable = {name: dtype for name, (_, dtype) in DTYPES.items() if dtype is not None}
    written = {name: values.to(dtype) for name, dtype in readable.items()}
    save_file(written, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as oracle:
        for name, tensor in written.items():
            assert checkpoint.info(name).dtype == name
            got, expected = checkpoint.read(name), oracle.get_tensor(name)
            assert got.dtype == expected.dtype == tensor.dtype
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_sample_model_equals_the_library(nano_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(nano_checkpoint)
    for file in checkpoint.files:
        with safe_open(file, "pt") as oracle:
            for name in oracle.keys():  # noqa: SIM118
                assert torch.equal(checkpoint.read(name), oracle.get_tensor(name))


def test_slices_of_the_leading_dimension(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", TENSORS)
    checkpoint = Checkpoint.open(tmp_path)
    for index in range(3):
        assert torch.equal(checkpoint.read_slice("a", index), TENSORS["a"][index])
    assert checkpoint.read_slice("c", 1).shape == (1, 3)
    for name, index in (("a", 3), ("a", -1), ("scalar", 0), ("empty", 0)):
        with pytest.raises(IndexError, match=f"tensor {name} .* has no slice {index}"):
            checkpoint.read_slice(name, index)


def test_unknown_tensor_and_unreadable_dtype(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"a": TENSORS["b"]})
    data = (tmp_path / "model.safetensors").read_bytes().replace(b'"F32"', b'"BOOL"').replace(b"[5]", b"[20]")
    (tmp_path / "model.safetensors").write_bytes(
        (int.from_bytes(data[:8], "little") + 2).to_bytes(8, "little") + data[8:]
    )
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(InvalidInputError, match="no tensor nothing"):
        checkpoint.read("nothing")
    with pytest.raises(InvalidInputError, match="dtype BOOL cannot be read"):
        checkpoint.read("a")


def test_file_cut_after_opening(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", TENSORS)
    checkpoint = Checkpoint.open(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(checkpoint.info("b").offset + 3)
    with pytest.raises(CorruptFileError, match="truncated at byte"):
        checkpoint.read("b")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidInputError, match="No such file"):
        checkpoint.read("b")


def test_survives_pickling(tmp_path: Path) -> None:
    save_sharded(tmp_path, TENSORS, 2)
    checkpoint = pickle.loads(pickle.dumps(Checkpoint.open(tmp_path)))
    assert torch.equal(checkpoint.read("a"), TENSORS["a"])


def change_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((directory / INDEX).read_text())
    changed = change(index)
    (directory / INDEX).write_text(json.dumps(index if changed is None else changed))


INDEX_ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "up": (
        lambda i: i["weight_map"].update(a="../model.safetensors"),
        "must be a bare .safetensors file name",
    ),
    "absolute": (
        lambda i: i["weight_map"].update(a="/etc/x.safetensors"),
        "must be a bare .safetensors file name",
    ),
    "folder": (
        lambda i: i["weight_map"].update(a="x/y.safetensors"),
        "must be a bare .safetensors file name",
    ),
    "backslash": (lambda i: i["weight_map"].update(a="x\\y.safetensors"), "must be a bare .safetensors"),
    "zero byte": (
        lambda i: i["weight_map"].update(a="x\0.safetensors"),
        "must be a bare .safetensors file name",
    ),
    "surrogate": (lambda i: i["weight_map"].update(a="\ud800.safetensors"), "must be a bare .safetensors"),
    "hidden": (lambda i: i["weight_map"].update(a=".x.safetensors"), "must be a bare .safetensors file name"),
    "other kind": (lambda i: i["weight_map"].update(a="x.bin"), "must be a bare .safetensors file name"),
    "number": (lambda i: i["weight_map"].update(a=1), "must be a bare .safetensors file name"),
    "no map": (lambda i: i.pop("weight_map") and None, "weight_map must be an object"),
    "empty map": (lambda i: i.update(weight_map={}), "weight_map must be an object"),
    "list": (lambda i: [1], "expected a JSON object, got list"),
    "tensor not in its shard": (
        lambda i: i["weight_map"].update(x=i["weight_map"]["a"]),
        "'x' is not in model-00001",
    ),
    "tensor not in the index": (
        lambda i: i["weight_map"].pop("a") and None,
        "holds tensor 'a', not in the index",
    ),
    "tensor elsewhere": (
        lambda i: i["weight_map"].update(a=i["weight_map"]["b"]),
        "holds tensor 'a', assigned to model-00002-of-00002.safetensors",
    ),
}


@pytest.mark.parametrize(("change", "message"), INDEX_ATTACKS.values(), ids=INDEX_ATTACKS.keys())
def test_hostile_index(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    save_sharded(tmp_path, TENSORS, 2)
    change_index(tmp_path, change)
    with pytest.raises(CorruptFileError) as caught:
        Checkpoint.open(tmp_path)
    assert message in str(caught.value)


def test_duplicate_name_in_the_index(tmp_path: Path) -> None:
    save_sharded(tmp_path, TENSORS, 2)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CorruptFileError, match="duplicate key 'a'"):
        Checkpoint.open(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no such file or directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match=r"no safetensors files$"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InvalidInputError, match=r"pickles .* are never read"):
        Checkpoint.open(tmp_path)
    with pytest.raises(InvalidInputError, match="expected a directory"):
        Checkpoint.open(tmp_path / "pytorch_model.bin")
    save_sharded(tmp_path, TENSORS, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        InvalidInputError, match=r"1 of 3 shards missing, first model-00002-of-00003\.safetensors"
    ):
        Checkpoint.open(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(InvalidInputError, match="2 safetensors files but no"):
        Checkpoint.open(tmp_path)


def test_single_file_beside_an_index_is_ambiguous(tmp_path: Path) -> None:
    save_sharded(tmp_path, TENSORS, 2)
    save(tmp_path / "model.safetensors", TENSORS)
    with pytest.raises(InvalidInputError, match="has both"):
        Checkpoint.open(tmp_path)


NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=3)
KINDS = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(NAMES, st.tuples(SHAPES, KINDS), min_size=1, max_size=5), shards=st.integers(1, 3)
)
def test_reads_back_whatever_was_written(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[list[int], torch.dtype]], shards: int
) -> None:
    folder = tmp_path_factory.mktemp("x")
    made = {
        name: torch.randint(0, 100, shape).to(dtype)
        for name, (shape, dtype) in tensors.items()
        if name.isprintable()
    }
    if not made:
        return
    save_sharded(folder, made, min(shards, len(made)))
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.names()) == set(made)
    for name, tensor in made.items():
        got = checkpoint.read(name)
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_never_crashes(tmp_path: Path, data: st.DataObject) -> None:
    """Any byte of the header changed: either the same rules still hold, or a CorruptFileError."""
    file = tmp_path / "model.safetensors"
    save(file, TENSORS)
    image = bytearray(file.read_bytes())
    header_end = 8 + int.from_bytes(image[:8], "little")
    image[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(image[: data.draw(st.integers(0, len(image)))] if data.draw(st.booleans()) else image)
    try:
        checkpoint = Checkpoint.open(file)
    except CorruptFileError:
        return
    for name in checkpoint.names():
        checkpoint.info(name)


READ_ALL = """
import sys
from kttools.checkpoint import Checkpoint
from tests.memory import peak_rss_bytes
checkpoint = Checkpoint.open(sys.argv[1])
before = peak_rss_bytes()
for name in checkpoint.names():
    if name == "stacked":
        for index in range(64):
            checkpoint.read_slice(name, index)
    else:
        checkpoint.read(name)
print(peak_rss_bytes() - before)
"""


def test_memory_holds_one_tensor(tmp_path: Path) -> None:
    """192 MB of tensors, the largest read at once 4 MB: RSS must not follow the file (no mapping stays)."""
    tensors = {f"t{i}": torch.zeros(1 << 20, dtype=torch.float32) for i in range(16)}
    tensors["stacked"] = torch.zeros(64, 512, 1024, dtype=torch.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
    assert int(done.stdout) < 48 << 20
