"""The sample model as a LayerRunner, and random documents of two domains."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kttools_runtime as kt
from kttools.profiling.data import Document
from kttools.profiling.layerwise import LayerRunner, Window, windows


@pytest.fixture(scope="module")
def runner(nano_bundle: Path) -> Iterator[LayerRunner]:
    before = torch.get_num_threads()
    yield LayerRunner(kt.load(nano_bundle, threads=1))
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def texts() -> list[Window]:
    generator = torch.Generator().manual_seed(1)
    documents = [
        Document("ab"[i % 2], f"f:{i}", torch.randint(5, 8000, (20 + i,), generator=generator).tolist())
        for i in range(12)
    ]
    return list(windows(documents, 64))
