"""Peak memory on tensors of DeepSeek-V3's true shapes: experts of 3 x 14.68 M weights, a long head."""

import json
from pathlib import Path

import pytest

from tests.large_shapes import VALUES, check_peak, hub_shapes, write_safetensors


def sparse_checkpoint(path: Path) -> Path:
    """Weights of zero in a file with holes: a GB to read, nothing on the disk."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(VALUES))
    tensors = [(name, "BF16", shape) for name, shape in hub_shapes().items()]
    write_safetensors(path / "model.safetensors", tensors)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_peak_memory_is_bounded_and_as_planned(tmp_path: Path, workers: int) -> None:
    source = sparse_checkpoint(tmp_path / "source")
    assert (source / "model.safetensors").stat().st_size > 8e8
    check_peak(source, tmp_path / "b", workers)
