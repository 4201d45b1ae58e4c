"""Experts of a pack to a device, one after the other: while one is computed the next is on its way.

Two places, each a host buffer (pinned on CUDA) and one of the device, so that VRAM is bounded whatever the
prompt. The host reads expert e + 1 from the pack and a side stream copies it while the main stream computes
e. Two events of a place keep that sound: `copied`, which the computation and the host's next read wait for,
and `used`, which the next copy waits for.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .streams import main_stream, make_stream
from .untile import ExpertCodes, PackFile

PLACES = 2


class Place:
    """Room for one expert on both sides. copied, used: events, None before the first."""

    __slots__ = ("buffer", "copied", "staging", "used")

    def __init__(self, size: int, device: torch.device) -> None:
        self.staging: Tensor = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.buffer: Tensor = torch.empty(size, dtype=torch.uint8, device=device)
        self.copied: Any = None
        self.used: Any = None


class ExpertFeed:
    """The way of one device's streamed experts; the layers of the device share it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side: Any = None  # made at the first run, which may never come
        self.main: Any = None
        self.places: list[Place] = []

    def run(self, pack: PackFile, experts: Sequence[int], work: Callable[[int, ExpertCodes], object]) -> None:
        """work(expert, its codes) for each, in order, on the main stream; the codes are gone when it is done.

        Returns when all is computed. Raises what a computation raised, and OSError of the pack.
        """
        if not experts:
            return
        self._make(max(pack.payload_bytes(expert) for expert in experts))
        try:
            self._fetch(pack, experts[0], 0)
            for turn, expert in enumerate(experts):
                self._compute(pack, expert, turn, work)
                if turn + 1 < len(experts):
                    self._fetch(pack, experts[turn + 1], turn + 1)
        finally:
            with ExitStack() as stack:
                stack.callback(self.main.synchronize)
                stack.callback(self.side.synchronize)

    def _make(self, size: int) -> None:
        """Streams, and places that are large enough; nothing is in flight between two runs."""
        if self.side is None:
            self.side = make_stream(self.device)
        self.main = self.main if self.device.type == "cpu" and self.main else main_stream(self.device)
        if not self.places or len(self.places[0].staging) < size:
            self.places = []  # before the larger ones are made
            self.places = [Place(size, self.device) for _ in range(PLACES)]

    def _fetch(self, pack: PackFile, expert: int, turn: int) -> None:
        place, size = self.places[turn % PLACES], pack.payload_bytes(expert)
        if place.copied is not None:
            self.side.hold(place.copied)
        pack.fill(expert, place.staging[:size])
        if place.used is not None:
            self.side.wait(place.used)
        self.side.copy(place.buffer[:size], place.staging[:size])
        place.copied = self.side.record()

    def _compute(
        self, pack: PackFile, expert: int, turn: int, work: Callable[[int, ExpertCodes], object]
    ) -> None:
        place, size = self.places[turn % PLACES], pack.payload_bytes(expert)
        self.main.wait(place.copied)
        self.main.compute(lambda: work(expert, pack.arranged(expert, place.buffer[:size])))
        place.used = self.main.record()
