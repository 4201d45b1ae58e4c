"""Fixtures that several test modules share; the compiled extension is imported only on demand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
KERNEL_TABLES = ("amx", "avx512", "avx2", "scalar")


def pytest_configure(config: pytest.Config) -> None:
    # A forced table, or another person's settings, must not decide what the tests see.
    for name in [name for name in os.environ if name.startswith("KTTOOLS_")]:
        del os.environ[name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`isa`: the test runs once for every kernel table; those this CPU lacks are skipped by name."""
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize(
            "isa", [pytest.param(name, marks=pytest.mark.isa) for name in KERNEL_TABLES], indirect=True
        )


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> str:
    """Name of a kernel table that this CPU supports."""
    from kttools_runtime import _kernels

    report = {row["name"]: row for row in _kernels.isa_report()}
    row = report.get(request.param)
    if row is None:
        pytest.skip(f"kernel table {request.param} is not built for this architecture")
    if not row["supported"]:
        pytest.skip(f"kernel table {request.param}: this CPU lacks {', '.join(row['missing'])}")
    return request.param


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return REPO


@pytest.fixture(scope="session")
def samples_dir() -> Path:
    """samples/ of the repository: ds3-nano/ and text/."""
    return REPO / "samples"


@pytest.fixture(scope="session")
def nano_checkpoint(samples_dir: Path) -> Path:
    """The Hugging Face directory of the sample model."""
    return samples_dir / "ds3-nano"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """A folder beside the checkout with larger models and corpora; skips where there is none."""
    shared = REPO.parent / "shared"
    if not shared.is_dir():
        pytest.skip("../shared is not here (larger trained models and corpora)")
    return shared


@pytest.fixture(scope="session")
def tiny_checkpoint(shared_dir: Path) -> Path:
    """The Hugging Face directory of the larger trained model; skipped where it is missing."""
    path = shared_dir / "models" / "ds3-tiny"
    if not path.is_dir():
        pytest.skip("../shared/models/ds3-tiny is not here")
    return path


def quantize(source: Path, bundle: Path, *options: str) -> Path:
    """Run `kttools quantize` as a user would; a failure shows its own message."""
    arguments = ["quantize", str(source), "-o", str(bundle), "--quiet", *options]
    command = [sys.executable, "-m", "kttools", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return bundle


@pytest.fixture(scope="session")
def nano_bundle(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model with int8 experts and int4 shards. Read-only: copy it before changing a byte."""
    bundle = tmp_path_factory.mktemp("bundles") / "ds3-nano-int8-int4"
    return quantize(nano_checkpoint, bundle, "--cpu-format", "int8", "--gpu-format", "int4")


@pytest.fixture(scope="session")
def nano_bundle_bf16(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model with nothing quantised: the reference path. Read-only."""
    bundle = tmp_path_factory.mktemp("bundles") / "ds3-nano-bf16"
    return quantize(nano_checkpoint, bundle, "--cpu-format", "bf16", "--gpu-format", "bf16")
