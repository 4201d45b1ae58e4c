"""Submit and sync from streams: order, several layers in flight, errors and timeouts, misuse.

The same C functions that a CUDA stream runs as host functions are run by simulated streams here. Oracle: the
layer's own forward. tests/csrc/expert_queue_race.cpp does the like under ThreadSanitizer.
"""

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kttools_runtime as kt
from kttools_runtime import _kernels
from kttools_runtime.errors import EngineError
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.hybrid.handoff import Courier, HandoffBuffers
from kttools_runtime.hybrid.recorder import recorded
from kttools_runtime.hybrid.streams import SimulatedStream
from kttools_runtime.moe import RoutedExperts

HIDDEN, INNER, EXPERTS, TOP = 64, 32, 6, 3
# A thousand take 2 s on an idle core.
INTERLEAVINGS = int(os.environ.get("HYBRID_INTERLEAVINGS", "1000"))


@pytest.fixture(scope="module")
def layers() -> list[RoutedExperts]:
    """Four small layers with different weights on one engine of two threads."""
    engine = ExpertEngine(2)
    generator = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    made = []
    for _ in range(4):
        gate, up = weights(EXPERTS, INNER, HIDDEN), weights(EXPERTS, INNER, HIDDEN)
        layer = engine.layer_from_tensors(gate, up, weights(EXPERTS, HIDDEN, INNER), "bf16")
        made.append(RoutedExperts(layer, torch.float32))
    return made


class Slot:
    """Device tensors and host buffers of one layer in flight."""

    def __init__(self, courier: Courier, experts: RoutedExperts) -> None:
        self.experts = experts
        self.host = HandoffBuffers(1, HIDDEN, TOP, torch.float32, False)
        self.call = self.host.call(courier.queue, experts)
        self.x, self.out = torch.zeros(1, HIDDEN), torch.zeros(1, HIDDEN)
        self.ids, self.weights = torch.zeros(1, TOP, dtype=torch.int64), torch.zeros(1, TOP)

    def fill(self, dice: random.Random) -> torch.Tensor:
        """New inputs; returns what the layer makes of them."""
        self.x.copy_(torch.tensor([[dice.uniform(-1, 1) for _ in range(HIDDEN)]]))
        self.ids.copy_(torch.tensor([[dice.randrange(-1, EXPERTS) for _ in range(TOP)]]))
        self.weights.copy_(torch.tensor([[dice.random() for _ in range(TOP)]]))
        return self.experts.layer.forward(self.x, self.ids, self.weights)

    def submit(self, stream: SimulatedStream) -> None:
        for to, source in (
            (self.host.x, self.x),
            (self.host.ids, self.ids),
            (self.host.weights, self.weights),
        ):
            stream.copy(to, source)
        stream.host(_kernels.SUBMIT_CALL, self.call.address)

    def sync(self, stream: SimulatedStream) -> None:
        stream.host(_kernels.SYNC_CALL, self.call.address)
        stream.copy(self.out, self.host.out)


def test_random_interleavings(layers: list[RoutedExperts]) -> None:
    """Six calls over four layers on two streams, awaited in any order: no hang, no mixture."""
    courier = Courier(60.0)
    dice = random.Random(0)
    slots = [Slot(courier, layers[index % len(layers)]) for index in range(6)]
    streams = [SimulatedStream(), SimulatedStream()]
    for step in range(INTERLEAVINGS):
        courier.begin()
        in_flight: list[list[Slot]] = [[], []]
        expected = []
        for slot in dice.sample(slots, len(slots)):
            side = dice.randrange(2)
            expected.append((slot, slot.fill(dice)))
            slot.submit(streams[side])
            in_flight[side].append(slot)
            while in_flight[side] and dice.random() < 0.4:
                in_flight[side].pop(dice.randrange(len(in_flight[side]))).sync(streams[side])
        for stream, rest in zip(streams, in_flight, strict=True):
            for slot in dice.sample(rest, len(rest)):
                slot.sync(stream)
        for stream in streams:
            stream.synchronize()
        courier.check()
        for slot, wanted in expected:
            assert torch.equal(slot.out, wanted), step


def test_random_faults_between_sound_steps(layers: list[RoutedExperts]) -> None:
    """A planted error in any of six calls in flight on two streams: raised at the step's end, whichever it
    was; what the step's other calls left behind does not reach the next, whose buffers are the same."""
    courier = Courier(60.0)
    dice = random.Random(7)
    slots = [Slot(courier, layers[index % len(layers)]) for index in range(6)]
    streams = [SimulatedStream(), SimulatedStream()]
    for step in range(INTERLEAVINGS // 5):
        is_faulty = step % 2 == 0
        courier.begin()
        if is_faulty:
            courier.queue.inject(
                error=f"planted {step}", delay_s=dice.choice((0.0, 0.001)), skipped=dice.randrange(6)
            )
        expected = [(slot, slot.fill(dice), streams[dice.randrange(2)]) for slot in dice.sample(slots, 6)]
        for slot, _, stream in expected:
            slot.submit(stream)
        for slot, _, stream in dice.sample(expected, 6):
            slot.sync(stream)
        for stream in streams:
            stream.synchronize()
        if is_faulty:
            with pytest.raises(EngineError, match=f"planted {step}"):
                courier.check()
            continue
        courier.check()
        for slot, wanted, _ in expected:
            assert torch.equal(slot.out, wanted), step


def test_results_come_before_sync_returns(layers: list[RoutedExperts]) -> None:
    """A layer that takes its time holds up the stream, and nothing else."""
    courier = Courier(60.0)
    slot, stream = Slot(courier, layers[0]), SimulatedStream()
    wanted = slot.fill(random.Random(1))
    courier.queue.inject(delay_s=0.2)
    start = time.monotonic()
    slot.submit(stream)
    slot.sync(stream)
    issued = time.monotonic() - start
    stream.synchronize()
    assert issued < 0.1 < time.monotonic() - start
    assert torch.equal(slot.out, wanted)
    assert courier.queue.stats["calls"] == 1
    assert courier.queue.stats["waited_s"] >= 0.15


@pytest.mark.parametrize("fault", ["error", "bad_id", "timeout", "twice", "never_submitted"])
def test_faults_surface_and_pass(layers: list[RoutedExperts], fault: str) -> None:
    """An exception with the reason at the step's end; the step behind it is sound."""
    courier = Courier(0.15)
    first, second = Slot(courier, layers[0]), Slot(courier, layers[1])
    stream, dice = SimulatedStream(), random.Random(2)
    messages = {
        "error": "planted",
        "bad_id": "17",
        "timeout": "longer than 0.15",
        "twice": "in flight",
        "never_submitted": "not submitted",
    }
    for slot in (first, second):
        slot.fill(dice)
    if fault == "error":
        courier.queue.inject(error="planted")
    if fault == "bad_id":
        first.ids.fill_(17)
    if fault in ("timeout", "twice"):
        courier.queue.inject(delay_s=0.4)
    if fault != "never_submitted":
        first.submit(stream)
    if fault == "twice":
        first.submit(stream)
    first.sync(stream)
    second.submit(stream)
    second.sync(stream)
    start = time.monotonic()
    stream.synchronize()
    assert time.monotonic() - start < 5
    with pytest.raises(EngineError, match=messages[fault]):
        courier.check()
    courier.timeout_s = 5.0
    courier.begin()
    courier.queue.inject()
    wanted = first.fill(dice)
    first.submit(stream)
    first.sync(stream)
    stream.synchronize()
    courier.check()
    assert torch.equal(first.out, wanted)


def test_a_busy_engine_refuses_the_next_step(layers: list[RoutedExperts]) -> None:
    courier = Courier(0.05)
    slot, stream = Slot(courier, layers[0]), SimulatedStream()
    slot.fill(random.Random(3))
    courier.queue.inject(delay_s=0.5)
    slot.submit(stream)
    slot.sync(stream)
    stream.synchronize()
    with pytest.raises(EngineError, match="still busy with an earlier step"):
        courier.begin()


@pytest.mark.parametrize("device", ["cpu:0", "cpu:0,cpu:1"])
def test_a_model_survives_faults(
    nano_bundle_bf16: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors and timeouts in decode (issued, captured, replayed) and in prefill; then the right logits."""
    monkeypatch.setenv("KTTOOLS_ENGINE_TIMEOUT", "0.3")
    plain = kt.load(nano_bundle_bf16, dtype="float32", threads=1)
    model: Any = kt.load(nano_bundle_bf16, device=device, dtype="float32", threads=1, prefill="cpu")
    cache = model.new_cache(16)
    queue = model.courier.queue
    for token, fault in enumerate([{"error": "planted"}, {"delay_s": 0.45}, {"error": "planted"}]):
        queue.inject(**fault)
        with pytest.raises(EngineError, match=r"planted|longer than 0\.3"):
            model.decode(token, cache)
        assert cache.length == token
        model.decode(token, cache)
    queue.inject(error="planted")
    with pytest.raises(EngineError, match="planted"):
        model.prefill([3, 4, 5], cache)
    assert cache.length == 3
    assert torch.allclose(model.prefill([3, 4, 5], cache), plain.logits(range(6))[-1], atol=1e-3)


@pytest.mark.parametrize("skipped", range(6))
def test_faults_with_deferral_on_several_devices(
    nano_bundle_bf16: Path, skipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the five calls of a step (three layers, two of them with a late one) on three devices each fails,
    late ones too, in issued, captured and replayed steps; the same cache then goes on as if nothing was."""
    monkeypatch.setenv("KTTOOLS_ENGINE_TIMEOUT", "0.4")
    options: dict[str, Any] = {"dtype": "float32", "threads": 1, "defer_experts": 2, "prefill": "cpu"}
    model: Any = kt.load(nano_bundle_bf16, device="cpu,cpu,cpu", **options)
    wanted = model.logits(range(5))
    cache = model.new_cache(8)
    for token, fault in enumerate(
        [{"error": "planted"}, {"delay_s": 0.6}, {"error": "planted"}, {"error": "planted"}]
    ):
        model.courier.queue.inject(skipped=skipped, **fault)
        if skipped < 5:
            with pytest.raises(EngineError, match=r"planted|longer than 0\.4"):
                model.decode(token, cache)
            assert cache.length == token
        model.courier.queue.inject()
        assert torch.allclose(model.decode(token, cache), wanted[token], atol=1e-3)


def test_a_failing_computation_surfaces() -> None:
    """What a device computation raises comes out at the end; what stands behind it is left out."""
    stream, after = SimulatedStream(), []
    stream.compute(lambda: 1 // 0)
    stream.compute(lambda: after.append(1))
    with pytest.raises(ZeroDivisionError):
        stream.synchronize()
    stream.compute(lambda: after.append(2))
    stream.synchronize()
    assert after == [2]


def test_streams_follow_each_other() -> None:
    first, second, order = SimulatedStream(), SimulatedStream(), []
    for step in range(20):
        first.compute(lambda step=step: (time.sleep(0.001), order.append(("first", step))))
        second.follow(first)
        second.compute(lambda step=step: order.append(("second", step)))
        first.follow(second)
    first.synchronize()
    second.synchronize()
    assert order == [(name, step) for step in range(20) for name in ("first", "second")]


def test_recorded_calls_read_tensors_and_bake_numbers() -> None:
    """A replay sees what tensors hold then; a Python number is what it was, which is why steps use none."""
    place, out, number = torch.zeros(3), torch.zeros(3), [1.0]
    with torch.inference_mode():
        calls = recorded(lambda: out.copy_((place + 1).mul_(2)).add_(number[0]))
        place.fill_(5.0)
        number[0] = 100.0
        calls.replay()
    assert out.tolist() == [13.0] * 3


def test_recording_refuses_to_ask_the_device() -> None:
    value = torch.ones(1)
    with pytest.raises(RuntimeError, match="reads a value of the device"):
        recorded(lambda: value.item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((2, TOP), np.int64)}, "ids has shape"),
        ({"x": np.zeros((1, HIDDEN + 1), np.float32)}, "x has shape"),
        ({"weights": np.zeros((1, TOP), np.float64)}, "weights must be float32"),
        ({"out": np.zeros((1, HIDDEN - 1), np.float32)}, "out has shape"),
    ],
)
def test_bad_blocks(layers: list[RoutedExperts], change: dict[str, Any], message: str) -> None:
    arrays = {
        "x": np.zeros((1, HIDDEN), np.float32),
        "ids": np.zeros((1, TOP), np.int64),
        "weights": np.zeros((1, TOP), np.float32),
        "out": np.zeros((1, HIDDEN), np.float32),
    }
    with pytest.raises(ValueError, match=message):
        _kernels.ExpertCall(Courier(1.0).queue, layers[0].layer.native, **{**arrays, **change})


def test_bad_numbers(layers: list[RoutedExperts]) -> None:
    with pytest.raises(ValueError, match="timeout must be"):
        _kernels.ExpertQueue(0.0)
    call = HandoffBuffers(2, HIDDEN, TOP, torch.float32, False).call(Courier(1.0).queue, layers[0])
    with pytest.raises(ValueError, match="rows must be 1 to 2, got 3"):
        call.set_rows(3)
    with pytest.raises(ValueError, match="address is 0"):
        _kernels.SimStream().host(0, 0)
