"""A model whose layers are streamed is the same model, and holds one layer."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

import kttools_runtime as kt
from kttools_runtime.errors import UsageError
from kttools_runtime.layer_stream import LayerStream


class Built:
    def __init__(self, index: int) -> None:
        self.index = index


def test_one_layer_is_held_and_the_old_one_goes_first() -> None:
    alive: list[weakref.ref[Built]] = []

    def build(index: int) -> Built:
        gc.collect()
        assert all(layer() is None for layer in alive)
        alive.append(weakref.ref(layer := Built(index)))
        return layer

    stream = LayerStream(build, 3)  # type: ignore[arg-type]
    assert stream[1] is stream[1]
    assert len(alive) == 1
    assert [stream[index].index for index in (0, 1, 2)] == [0, 1, 2]  # type: ignore[attr-defined]
    with pytest.raises(IndexError):
        stream[3]
    with pytest.raises(TypeError, match="one at a time"):
        stream[:2]


def test_streamed_layers_give_the_same_model(nano_bundle: Path) -> None:
    before = torch.get_num_threads()
    whole = kt.load(nano_bundle, threads=1, expert_table="none")
    streamed = kt.load(nano_bundle, threads=1, expert_table="none", stream_layers=True)
    ids = torch.randint(5, 8000, (40,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole.logits(ids), streamed.logits(ids))
    assert whole.fingerprint() == streamed.fingerprint()
    torch.set_num_threads(before)
    with pytest.raises(UsageError, match="while layers are streamed"):
        streamed.use_table(None)
    with pytest.raises(UsageError, match='must be "none"'):
        kt.load(nano_bundle, threads=1, stream_layers=True)
