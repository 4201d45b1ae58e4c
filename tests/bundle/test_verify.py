"""Verify notices a single flipped bit in every region of every file, and says which file."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kttools.bundle.manifest import collect_files
from kttools.bundle.verify import verify_bundle
from kttools.commands.verify import command
from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.pack import header_size
from tests.bundle.conftest import shard_tensors, sign, write_pack
from tests.forge import save_sharded

PACK = "experts/layer-00001.ktpack"
SHARD = "shards/model-00001-of-00002.safetensors"
INDEX = "shards/model.safetensors.index.json"


def flip(file: Path, position: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def test_sound(sound_bundle: Path) -> None:
    seen: list[int] = []
    result = verify_bundle(sound_bundle, on_start=seen.append)
    assert result.problems == []
    assert result.extra == []
    assert seen == [result.bytes]
    assert result.files == len(collect_files(sound_bundle))
    result.raise_on_problems()


def regions(bundle: Path) -> list[tuple[str, int]]:
    """A byte of every region: pack fields, table, padding, blobs; shard length, header, data; small files."""
    pack, shard = (bundle / PACK).read_bytes(), (bundle / SHARD).read_bytes()
    data_start = 8 + int.from_bytes(shard[:8], "little")
    table_end, header = 64 + 32 * 6, header_size(6)
    in_pack = [
        *range(0, 64, 3),
        64,
        table_end - 1,
        table_end,
        header - 1,
        header,
        len(pack) - 1,
    ]
    in_shard = [0, 7, 8, 20, data_start - 1, data_start, data_start + 1, len(shard) - 1]
    others = ["tokenizer/tokenizer.json", "quantization-report.json", INDEX]
    return [
        *((PACK, position) for position in in_pack),
        *((SHARD, position) for position in in_shard),
        *((name, position) for name in others for position in (0, (bundle / name).stat().st_size - 1)),
    ]


def test_flips_in_every_region(bundle: Path) -> None:
    for name, position in regions(bundle):
        flip(bundle / name, position)
        result = verify_bundle(bundle)
        assert any(
            problem.startswith(f"{name}: content changed: expected xxh3_128") for problem in result.problems
        )
        with pytest.raises(CorruptFileError, match=name):
            result.raise_on_problems()
        flip(bundle / name, position)
    assert verify_bundle(bundle).problems == []


def test_flips_in_the_manifest(bundle: Path) -> None:
    size = (bundle / "bundle.json").stat().st_size
    for position in [0, size - 1, *random.Random(0).sample(range(size), 100)]:
        flip(bundle / "bundle.json", position, bit=position % 8)
        with pytest.raises(InvalidInputError):
            verify_bundle(bundle, is_quick=True)
        flip(bundle / "bundle.json", position, bit=position % 8)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flip_anywhere_is_found(bundle: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(collect_files(bundle)))
    size = (bundle / name).stat().st_size
    position, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
    flip(bundle / name, position, bit)
    try:
        problems = verify_bundle(bundle, threads=2).problems
        assert [problem for problem in problems if problem.startswith(name)]
    finally:
        flip(bundle / name, position, bit)


def test_quick_sees_sizes_and_headers_but_not_data(bundle: Path) -> None:
    flip(bundle / PACK, header_size(6) + 5)
    assert verify_bundle(bundle, is_quick=True).problems == []
    flip(bundle / PACK, 20)
    [problem] = verify_bundle(bundle, is_quick=True).problems
    assert problem.startswith(f"{PACK}: ")
    (bundle / SHARD).write_bytes((bundle / SHARD).read_bytes()[:-1])
    problems = verify_bundle(bundle, is_quick=True).problems
    assert any(problem.startswith(f"{SHARD}: expected ") for problem in problems)


def test_all_problems_are_listed(bundle: Path) -> None:
    (bundle / "tokenizer/tokenizer.json").unlink()
    flip(bundle / PACK, 9000)
    flip(bundle / SHARD, 9)
    result = verify_bundle(bundle)
    assert len(result.problems) == 3
    with pytest.raises(CorruptFileError, match=r"\(first of 3 problems\)"):
        result.raise_on_problems()


def test_extra_files_are_named_and_harmless(bundle: Path) -> None:
    (bundle / "experts/layer-00099.ktpack").write_bytes(b"x")
    (bundle / "notes.txt").write_text("x")
    result = verify_bundle(bundle)
    assert result.problems == []
    assert result.extra == ["experts/layer-00099.ktpack", "notes.txt"]


def test_a_link_out_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / PACK, tmp_path / "outside")
    (bundle / PACK).symlink_to(tmp_path / "outside")
    assert verify_bundle(bundle).problems == [f"{PACK}: a symbolic link leads out of the bundle"]


# Bundles that were signed over content that does not belong together: hashes agree, headers do not.
def swap_packs(bundle: Path) -> None:
    write_pack(bundle / PACK, layer=2, seed=0)


def garbage_pack(bundle: Path) -> None:
    (bundle / PACK).write_bytes(bytes(5000))


def garbage_shard(bundle: Path) -> None:
    (bundle / SHARD).write_bytes(bytes(100))


def drop_row_scale(bundle: Path) -> None:
    tensors, _ = shard_tensors()
    del tensors["model.layers.0.self_attn.o_proj.row_scale"]
    save_sharded(bundle / "shards", tensors, 2)


def drop_norm(bundle: Path) -> None:
    tensors, _ = shard_tensors()
    del tensors["model.norm.weight"]
    save_sharded(bundle / "shards", tensors, 2)


def wrong_shape(bundle: Path) -> None:
    tensors, _ = shard_tensors()
    tensors["model.norm.weight"] = torch.zeros(3)
    save_sharded(bundle / "shards", tensors, 2)


MISMATCHES: list[tuple[Callable[[Path], None], str]] = [
    (swap_packs, f"{PACK}: layer: expected 1 by bundle.json, got 2"),
    (garbage_pack, "not a pack"),
    (garbage_shard, "header of 0 bytes"),
    (drop_row_scale, "int8 linear model.layers.0.self_attn.o_proj has no tensor"),
    (drop_norm, "tensor model.norm.weight is missing"),
    (wrong_shape, "tensor model.norm.weight: expected shape [24], got [3]"),
]


@pytest.mark.parametrize(("change", "message"), MISMATCHES, ids=lambda value: getattr(value, "__name__", ""))
def test_headers_against_the_model(
    bundle: Path, linears: dict[str, str], change: Callable[[Path], None], message: str
) -> None:
    change(bundle)
    sign(bundle, linears)
    for is_quick in (False, True):
        problems = verify_bundle(bundle, is_quick=is_quick).problems
        assert any(message in problem for problem in problems), problems


def test_linears_of_no_model(bundle: Path, linears: dict[str, str]) -> None:
    sign(bundle, linears | {"model.norm": "bf16", "model.layers.9.mlp.up_proj": "int4"})
    problems = verify_bundle(bundle).problems
    assert "linears: model.norm is no linear of this model" in problems
    assert "linears: model.layers.9.mlp.up_proj is no linear of this model" in problems


def test_command(bundle: Path) -> None:
    done = CliRunner().invoke(command, [str(bundle)])
    assert done.exit_code == 0
    assert "sound: " in done.stdout
    (bundle / "notes.txt").touch()
    document = json.loads(CliRunner().invoke(command, [str(bundle), "--quick", "--json"]).stdout)
    assert document["ok"] is True
    assert document["is_quick"] is True
    assert document["extra"] == ["notes.txt"]
    flip(bundle / PACK, 9000)
    failed = CliRunner().invoke(command, [str(bundle), "--json"])
    assert json.loads(failed.stdout)["ok"] is False
    assert isinstance(failed.exception, CorruptFileError)
    assert failed.exception.exit_code == 3


def test_command_on_a_damaged_manifest(bundle: Path) -> None:
    flip(bundle / "bundle.json", 50)
    failed = CliRunner().invoke(command, [str(bundle), "--json"])
    assert json.loads(failed.stdout)["ok"] is False
    assert isinstance(failed.exception, CorruptFileError)


def test_command_on_no_bundle(tmp_path: Path) -> None:
    failed = CliRunner().invoke(command, [str(tmp_path)])
    assert isinstance(failed.exception, InvalidInputError)
    assert "not a bundle" in str(failed.exception)


def test_real_bundle(nano_bundle: Path) -> None:
    result = verify_bundle(nano_bundle)
    assert result.problems == []
    assert result.extra == []
