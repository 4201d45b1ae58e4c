"""A decode step as programs of the devices' streams: issued, or captured once and replayed.

Nothing in it depends on a Python number that changes: position, rotations and masks are tensors of fixed
place, written before the step. Between two computations values live in such tensors too, never in Python.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kttools_runtime import _kernels
from kttools_runtime.mlp import GatedMLP

from .handoff import HandoffBuffers
from .mixture import Mixture
from .static_attention import StaticStep, attend, step_masks, window_of
from .streams import Stream, make_stream

if TYPE_CHECKING:
    from kttools_runtime.model import DecoderLayer

    from .model import HybridModel

# Steps look at 256 cached tokens, or twice as many, and so on: a captured graph for each.
SEEN_TOKENS = 256


def seen_tokens(length: int, capacity: int) -> int:
    """Rows of the cache that a step looks at when `length` of them hold tokens."""
    seen = SEEN_TOKENS
    while seen < length:
        seen *= 2
    return min(seen, capacity)


class LayerStep:
    """The fixed tensors of one layer's second half, and its argument blocks.

    arrived: what is late, on the device of the layer behind (`next_device`).
    """

    def __init__(self, model: "HybridModel", mixture: Mixture, next_device: torch.device) -> None:
        self.mixture = mixture
        config = model.config
        device, hidden, k = mixture.device, config.hidden_size, config.num_experts_per_tok
        self.x = torch.zeros(1, hidden, device=device)
        self.ids = torch.full((1, k), -1, dtype=torch.int64, device=device)
        self.own_ids = self.ids.clone()
        self.late_ids = self.ids.clone()
        self.weights = torch.zeros(1, k, device=device)
        self.extra = torch.zeros(1, hidden, device=device)
        self.routed = torch.zeros(1, hidden, device=device)
        self.arrived = torch.zeros(1, hidden, device=next_device)
        self.is_late = bool(mixture.defer)
        pinned = device.type == "cuda"
        self.now, self.late = (HandoffBuffers(1, hidden, k, torch.float32, pinned) for _ in range(2))
        queue, experts = mixture.courier.queue, mixture.layer.experts
        self.now_call, self.late_call = (side.call(queue, experts) for side in (self.now, self.late))

    def route(self, x: Tensor) -> None:
        """Everything the engine and the device's own experts need, into its place."""
        self.x.copy_(x)
        choice, ids = self.mixture.choose(self.x, True)
        width = ids.shape[1]  # an expert table may give fewer than the model's own
        self.ids[:, :width].copy_(ids)
        self.own_ids[:, :width].copy_(choice.ids)
        self.weights[:, :width].copy_(choice.weights)
        if choice.late_ids is not None:
            self.late_ids[:, :width].copy_(choice.late_ids)

    def beside(self) -> None:
        """What the device computes while the engine does."""
        self.extra.zero_()
        if self.mixture.layer.shared is not None:
            self.extra.add_(self.mixture.layer.shared(self.x))
        if self.mixture.hot is not None:
            self.extra.add_(self.mixture.hot.one(self.x, self.ids, self.weights))


@dataclass(slots=True)
class Part:
    """The run of layers on one device. hidden: float32 [1, hidden_size], the residual stream."""

    first: int
    layers: "Sequence[DecoderLayer]"
    stream: Any
    hidden: Tensor
    position: Tensor
    rope: Tensor
    rotations: Tensor
    replays: dict[int, Callable[[], None]]
    issued: set[int]
    masks: dict[int, dict[int | None, Tensor]]


class DecodeStep:
    """One token through a model, for one cache."""

    def __init__(self, model: "HybridModel", caches: Sequence[Tensor]) -> None:
        self.model = model
        self.caches = caches
        capacity = caches[0].shape[0]
        pinned = model.device.type == "cuda"
        self.host_row = torch.zeros(1, model.config.hidden_size, pin_memory=pinned)
        self.host_position = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)
        last = model.config.num_hidden_layers - 1
        self.mixtures = {
            index: LayerStep(model, mixture, model.device_of(min(index + 1, last)))
            for index, mixture in model.mixtures.items()
        }
        self.parts = [self._part(index, capacity) for index in sorted(set(model.layer_devices))]
        self.logits = torch.zeros(1, model.config.vocab_size, device=self.parts[-1].hidden.device)

    def run(self, row: Tensor, position: int) -> Tensor:
        """row: the token's embedding [hidden_size] -> logits float32 [vocab_size], a tensor of fixed place.

        Raises EngineError when the experts fail or take too long; the cache row is then to be written again.
        """
        courier = self.model.courier
        courier.begin()
        self.host_row.copy_(row[None])
        self.host_position.fill_(position)
        seen = seen_tokens(position + 1, self.caches[0].shape[0])
        before: Part | None = None
        with ExitStack() as stack:
            for part in self.parts:
                stack.callback(part.stream.synchronize)
                part.stream.follow_default()
                if before is not None:
                    part.stream.follow(before.stream)
                part.stream.copy(part.position, self.host_position)
                issue = self._issue(part, seen)
                part.stream.copy(part.hidden, self.host_row if before is None else before.hidden)
                issue()
                before = part
        courier.check()
        return self.logits[0]

    def _issue(self, part: Part, seen: int) -> Callable[[], None]:
        """The first step of a size is issued operation by operation, the second captured, then replayed.

        A capture in the simulation runs the computations, so it must come before the step's own hidden state,
        and writes the cache row that the step itself then writes.
        """

        def program(stream: Stream) -> None:
            self._program(part, seen, stream)

        if seen not in part.masks:
            part.masks[seen] = step_masks(part.position, seen, _windows(part), self.model.dtype)
        if seen in part.issued and seen not in part.replays and self.model.options.graphs:
            part.replays[seen] = part.stream.capture(program)
        part.issued.add(seen)
        return part.replays.get(seen) or functools.partial(program, part.stream)

    def _program(self, part: Part, seen: int, stream: Stream) -> None:
        masks = part.masks[seen]

        def prepare() -> None:
            part.rotations.copy_(part.rope.index_select(0, part.position))
            for window, mask in step_masks(part.position, seen, set(masks), self.model.dtype).items():
                masks[window].copy_(mask)

        stream.compute(prepare)
        step = StaticStep(part.position, part.rotations, seen, masks)
        for offset, layer in enumerate(part.layers):
            self._layer(part, part.first + offset, layer, step, stream)
        if part is self.parts[-1]:
            stream.compute(lambda: self.logits.copy_(self.model.head(part.hidden)))

    def _layer(self, part: Part, index: int, layer: "DecoderLayer", step: StaticStep, stream: Stream) -> None:
        hidden, cache = part.hidden, self.caches[index]

        def first_half() -> None:
            hidden.add_(attend(layer.attention, layer.attention_norm(hidden), step, cache))
            x = layer.mlp_norm(hidden)
            if isinstance(layer.mlp, GatedMLP):
                hidden.add_(layer.mlp(x))
            else:
                self.mixtures[index].route(x)

        stream.compute(first_half)
        own = self.mixtures.get(index)
        if own is not None:
            self._submit(own, stream)
            stream.compute(own.beside)
            stream.host(_kernels.SYNC_CALL, own.now_call.address)
            stream.copy(own.routed, own.now.out)
            stream.compute(lambda: hidden.add_(own.routed).add_(own.extra))
        before = self.mixtures.get(index - 1)
        if before is not None and before.is_late:
            stream.host(_kernels.SYNC_CALL, before.late_call.address)
            stream.copy(before.arrived, before.late.out)
            stream.compute(lambda: hidden.add_(before.arrived))

    def _submit(self, own: LayerStep, stream: Stream) -> None:
        sides = [(own.now, own.own_ids, own.now_call)]
        if own.is_late:
            sides.append((own.late, own.late_ids, own.late_call))
        for buffers, ids, call in sides:
            stream.copy(buffers.x, own.x)
            stream.copy(buffers.ids, ids)
            stream.copy(buffers.weights, own.weights)
            stream.host(_kernels.SUBMIT_CALL, call.address)

    def _part(self, index: int, capacity: int) -> Part:
        model = self.model
        first = model.layer_devices.index(index)
        count = model.layer_devices.count(index)
        device = model.devices.torch_devices[index]
        rope = model.ropes[index].rotations(0, capacity)
        return Part(
            first=first,
            layers=[model.layers[i] for i in range(first, first + count)],
            stream=make_stream(device),
            hidden=torch.zeros(1, model.config.hidden_size, device=device),
            position=torch.zeros(1, dtype=torch.int64, device=device),
            rope=rope,
            rotations=torch.zeros_like(rope[:1]),
            replays={},
            issued=set(),
            masks={},
        )


def _windows(part: Part) -> set[int | None]:
    return {window_of(layer.attention) for layer in part.layers}
