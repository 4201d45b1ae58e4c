"""Experts of a prompt on their way to a device: order and buffers under injected delays, overlap, errors.

Streams are simulated ones with random sleeps before what they do. Oracle: the same experts one at a time. The
guards are taken away in turn, to show that the test sees each of them.
"""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kttools_runtime as kt
from kttools_runtime.hybrid.feed import PLACES, ExpertFeed
from kttools_runtime.hybrid.hot import ExpertSum, gated
from kttools_runtime.hybrid.streams import SimulatedStream
from kttools_runtime.hybrid.untile import ExpertCodes, PackFile
from kttools_runtime.manifest import load_manifest

CPU = torch.device("cpu")
HIDDEN_TOKENS = 24


class SlowStream(SimulatedStream):
    """Everything takes a while; `log` has (what, begin, end)."""

    def __init__(self, sleep: Any, log: list[tuple[str, float, float]]) -> None:
        super().__init__()
        self.sleep, self.log = sleep, log

    def compute(self, work: Any) -> None:
        super().compute(lambda: self._timed("compute", work))

    def copy(self, to: Tensor, source: Tensor) -> None:
        super().compute(lambda: self._timed("copy", lambda: to.copy_(source)))

    def _timed(self, what: str, work: Any) -> None:
        begin = time.monotonic()
        time.sleep(self.sleep(what))
        work()
        self.log.append((what, begin, time.monotonic()))


@pytest.fixture(scope="module")
def pack(nano_bundle: Path) -> PackFile:
    return PackFile(load_manifest(nano_bundle).expert_path(1))


def inputs(pack: PackFile) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(HIDDEN_TOKENS, pack.shape[0], generator=generator)
    ids = torch.randint(-1, pack.header.num_experts, (HIDDEN_TOKENS, 4), generator=generator)
    return x, ids, torch.rand(HIDDEN_TOKENS, 4, generator=generator)


def one_by_one(pack: PackFile) -> Tensor:
    """Choice by choice, from the definition."""
    x, ids, weights = inputs(pack)
    out = torch.zeros_like(x)
    for row, column in (ids >= 0).nonzero().tolist():
        codes = pack.codes(int(ids[row, column]), CPU)
        out[row] += weights[row, column] * gated(x[row : row + 1], codes, torch.float32)[0]
    return out


def fed(pack: PackFile, sleep: Any, log: list[tuple[str, float, float]], without: str = "") -> Tensor:
    feed = ExpertFeed(CPU)
    feed.side, feed.main = SlowStream(sleep, log), SlowStream(sleep, log)
    if without == "used":
        feed.side.wait = lambda event: None
    if without == "copied":
        feed.main.wait = lambda event: None
    if without == "hold":
        feed.side.hold = lambda event: None
    x, ids, weights = inputs(pack)
    total = ExpertSum(x, ids, weights, pack.header.num_experts, torch.float32)
    feed.run(pack, range(pack.header.num_experts), total.add)
    return total.out


def test_nothing_is_overwritten_before_it_is_used(pack: PackFile) -> None:
    """Random delays of copies, computations, both or neither: always the sum of the experts one by one."""
    wanted, dice = one_by_one(pack), random.Random(0)
    for copies, computations in ((0.0, 0.0), (0.004, 0.0), (0.0, 0.004), (0.004, 0.004)):
        most = {"copy": copies, "compute": computations}
        got = fed(pack, lambda what, most=most: dice.uniform(0, most[what]), [])
        assert torch.allclose(got, wanted, atol=1e-5), most


@pytest.mark.parametrize(("guard", "slow"), [("used", "compute"), ("copied", "copy"), ("hold", "copy")])
def test_every_guard_is_needed(pack: PackFile, guard: str, slow: str) -> None:
    got = fed(pack, lambda what: 0.004 if what == slow else 0.0, [], guard)
    assert not torch.allclose(got, one_by_one(pack), atol=1e-3)


def test_copies_run_beside_computations(pack: PackFile) -> None:
    """The copy of e + 1 begins while e is computed, and never runs more than two experts ahead."""
    log: list[tuple[str, float, float]] = []
    fed(pack, lambda what: 0.006, log)
    copies = [row for row in log if row[0] == "copy"]
    computations = [row for row in log if row[0] == "compute"]
    assert len(copies) == len(computations) == pack.header.num_experts
    overlapped = sum(copy[1] < done[2] for copy, done in zip(copies[1:], computations[:-1], strict=True))
    assert overlapped > 0.7 * len(copies)
    for index, copy in enumerate(copies[PLACES:]):
        assert copy[1] >= computations[index][2] - 1e-4  # into the place that computation has left
    for copy, computation in zip(copies, computations, strict=True):
        assert copy[2] <= computation[1] + 1e-4


def test_two_places_whatever_the_prompt(pack: PackFile) -> None:
    feed = ExpertFeed(CPU)
    for experts in (range(3), range(20), []):
        feed.run(pack, list(experts), lambda expert, codes: None)
    assert [p.buffer.nbytes for p in feed.places] == [pack.payload_bytes(0)] * PLACES
    first = feed.places
    feed.run(pack, [1], lambda expert, codes: None)
    assert feed.places is first


def test_what_fails_surfaces_and_the_next_run_is_right(
    pack: PackFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, seen = ExpertFeed(CPU), []

    def work(expert: int, codes: ExpertCodes) -> None:
        seen.append(expert)
        if expert == 2:
            raise ArithmeticError("planted")

    with pytest.raises(ArithmeticError, match="planted"):
        feed.run(pack, range(8), work)
    assert seen == [0, 1, 2]
    fill = PackFile.fill

    def cut_short(self: PackFile, expert: int, target: Tensor) -> None:
        if expert == 4:
            raise OSError("cut short")
        fill(self, expert, target)

    monkeypatch.setattr(PackFile, "fill", cut_short)
    with pytest.raises(OSError, match="cut short"):
        feed.run(pack, range(3, 8), lambda expert, codes: None)
    monkeypatch.undo()
    x, ids, weights = inputs(pack)
    total = ExpertSum(x, ids, weights, pack.header.num_experts, torch.float32)
    feed.run(pack, range(pack.header.num_experts), total.add)
    assert torch.allclose(total.out, one_by_one(pack), atol=1e-5)


def test_formats_that_a_device_cannot_order_travel_as_bf16(tmp_path: Path) -> None:
    from tests.hybrid.test_hot_int4 import pack_of

    pack = pack_of(tmp_path / "p.ktpack", ["q4_k", "int8", "q4_k"])
    got: dict[int, Tensor] = {}
    ExpertFeed(CPU).run(
        pack, range(3), lambda e, codes: got.update({e: codes.down.dequantized().clone().float()})
    )
    for expert in range(3):
        assert torch.equal(got[expert], pack.codes(expert, CPU).down.dequantized().float())


def test_a_prompt_streams_through_one_feed(nano_bundle: Path) -> None:
    model: Any = kt.load(nano_bundle, device="cpu:0,cpu:1", threads=1, prefill="gpu")
    model.prefill(range(40), model.new_cache(40))
    feeds = {id(mixture.prefill.feed): mixture.prefill.feed for mixture in model.mixtures.values()}
    assert len(feeds) == 2
    assert all(len(feed.places) == PLACES for feed in feeds.values())
