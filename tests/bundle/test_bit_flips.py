"""Single flipped bits over a real bundle: verify finds every one, loading every one in a header.

BIT_FLIPS=200 python -m pytest tests/bundle/test_bit_flips.py       (200 flips instead of 24)
"""

import os
import random
import shutil
from pathlib import Path

import pytest

import kttools_runtime as kt
from kttools.bundle.verify import verify_bundle
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.manifest import load_manifest
from tests.bundle.test_verify import flip

FLIPS = int(os.environ.get("BIT_FLIPS", "24"))


@pytest.fixture
def copy(nano_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano_bundle, tmp_path / "bundle"))


def header_bytes(file: Path) -> int:
    """Of a pack, a shard, or the manifest, which is all header; 0 for others."""
    if file.suffix == ".ktpack":
        return int.from_bytes(file.read_bytes()[12:16], "little")
    if file.suffix == ".safetensors":
        return 8 + int.from_bytes(file.read_bytes()[:8], "little")
    return file.stat().st_size if file.name == "bundle.json" else 0


def anywhere(bundle: Path, rng: random.Random) -> tuple[Path, int, int]:
    """A bit of the bundle, every bit as likely as any other."""
    files = [bundle / "bundle.json", *(bundle / path for path in load_manifest(bundle).files)]
    file = rng.choices(files, [file.stat().st_size for file in files])[0]
    return file, rng.randrange(file.stat().st_size), rng.randrange(8)


def in_a_header(bundle: Path, rng: random.Random) -> tuple[Path, int, int]:
    """A bit of a header; every header as likely as any other."""
    files = [bundle / "bundle.json", *(bundle / path for path in load_manifest(bundle).files)]
    file = rng.choice([file for file in files if header_bytes(file)])
    return file, rng.randrange(header_bytes(file)), rng.randrange(8)


def is_found_by_verify(bundle: Path, file: Path) -> bool:
    name = file.relative_to(bundle).as_posix()
    try:
        result = verify_bundle(bundle)
    except InvalidInputError as error:
        return name == "bundle.json" and "bundle.json" in str(error)
    return result.broken == [name] and any(problem.startswith(f"{name}: ") for problem in result.problems)


def is_found_at_load(bundle: Path) -> bool:
    try:
        kt.load(bundle)
    except InvalidInputError as error:
        return "\n" not in str(error)
    return False


def test_verify_finds_every_flip(copy: Path) -> None:
    rng = random.Random(1)
    for _ in range(FLIPS):
        place = anywhere(copy, rng)
        flip(*place)
        assert is_found_by_verify(copy, place[0]), place
        flip(*place)
    assert not verify_bundle(copy).problems


def test_loading_finds_every_flip_of_a_header(copy: Path) -> None:
    rng = random.Random(2)
    for _ in range(FLIPS):
        place = in_a_header(copy, rng)
        flip(*place)
        assert is_found_at_load(copy), place
        assert is_found_by_verify(copy, place[0]), place
        flip(*place)
    assert not is_found_at_load(copy)
