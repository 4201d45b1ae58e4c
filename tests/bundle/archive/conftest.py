"""Bundles to pack."""

import random
import shutil
from pathlib import Path

import pytest

from tests.bundle.conftest import sign

BLOB = "extra/blob.bin"


@pytest.fixture(scope="session")
def large_bundle(
    sound_bundle: Path, linears: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The small bundle and a file of three frames: noise, zeros, noise. Read-only."""
    root = tmp_path_factory.mktemp("large") / "bundle"
    shutil.copytree(sound_bundle, root)
    (root / "extra").mkdir()
    noise = random.Random(5).randbytes(4 << 20)
    (root / BLOB).write_bytes(noise + bytes(4 << 20) + noise[::-1])
    (root / "bundle.json.sig").write_bytes(b"a signature, whatever it holds")
    signature = (root / "bundle.json.sig").read_bytes()
    sign(root, linears)
    (root / "bundle.json.sig").write_bytes(signature)
    return root
