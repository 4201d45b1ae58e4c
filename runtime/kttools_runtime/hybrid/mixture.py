"""A mixture of experts: routed ones on the CPU, some on the device, some of the CPU's delivered late."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kttools_runtime.moe import MoELayer

from .fused_router import Route
from .handoff import Courier, HandoffBuffers, take_down
from .hot import HotExperts
from .prefill import Prefill


@dataclass(slots=True)
class Choice:
    """ids int64 and weights float32 [T, k]; late_ids: those delivered one layer later, or None."""

    ids: Tensor
    weights: Tensor
    late_ids: Tensor | None


def split_late(ids: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(ids at once, ids late): the `count` lowest weights of each token are late; -1 in the other's place."""
    lowest = weights.masked_fill(ids < 0, torch.inf).topk(count, dim=1, largest=False).indices
    is_late = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, lowest, True)
    return ids.masked_fill(is_late, -1), ids.masked_fill(~is_late, -1)


class Mixture:
    """One MoE layer of a hybrid model.

    defer: experts of a token delivered one layer later; 0 for the last layer. hot: those on the device.
    route: the layer's router, or what stands for it (fused_router.py).
    """

    def __init__(
        self,
        layer: MoELayer,
        courier: Courier,
        hot: HotExperts | None,
        defer: int,
        prefill: Prefill,
        route: Route,
    ) -> None:
        self.layer = layer
        self.route = route
        self.courier = courier
        self.hot = hot
        self.defer = defer
        self.prefill = prefill
        self._buffers: HandoffBuffers | None = None
        self._call: Any = None

    @property
    def device(self) -> torch.device:
        return self.layer.router.weight.device

    def choose(self, x: Tensor, is_deferring: bool) -> tuple[Choice, Tensor]:
        """The engine's choice, and the router's own ids with those of the CPU in them."""
        ids, weights = self.route(x)
        own = ids if self.hot is None else self.hot.without(ids)
        if not (is_deferring and self.defer):
            return Choice(own, weights, None), ids
        now, late = split_late(own, weights, min(self.defer, ids.shape[1]))
        return Choice(now, weights, late), ids

    def chunk(self, x: Tensor, buffers: HandoffBuffers, is_deferring: bool) -> tuple[Tensor, Tensor | None]:
        """x [T, H] float32 -> (routed + shared, what the next layer gets), both [T, H]."""
        choice, ids = self.choose(x, is_deferring)
        late = None
        if choice.late_ids is not None:
            late = self._engine(x, choice.late_ids, choice.weights, buffers, None)
        plan = self.prefill.plan(self.layer.experts, choice.ids) if x.shape[0] > 1 else None
        own = choice.ids if plan is None else plan.cpu_ids

        def beside() -> Tensor | None:
            parts = []
            if self.layer.shared is not None:
                parts.append(self.layer.shared(x))
            if self.hot is not None:
                parts.append(self.hot.chunk(x, ids, choice.weights))
            if plan is not None and plan.device_experts:
                parts.append(self.prefill.on_device(self.layer.experts, x, choice, plan))
            return None if not parts else torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]

        return self._engine(x, own, choice.weights, buffers, beside), late

    def _engine(
        self, x: Tensor, ids: Tensor, weights: Tensor, buffers: HandoffBuffers, beside: Any
    ) -> Tensor:
        """The engine's part, and meanwhile `beside` on the device; their sum on x's device."""
        self._bind(buffers)
        for target, source in ((buffers.x, x), (buffers.ids[:, : ids.shape[1]], ids)):
            take_down(target, source)
        if ids.shape[1] < buffers.ids.shape[1]:
            buffers.ids[: len(x), ids.shape[1] :].fill_(-1)
        take_down(buffers.weights[:, : weights.shape[1]], weights)
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()
        self._call.set_rows(len(x))
        self._call.submit()
        extra = beside() if beside is not None else None
        self._call.sync()
        self.courier.check()
        routed = buffers.out[: len(x)].to(x.device, copy=True)
        return routed if extra is None else routed.add_(extra)

    def _bind(self, buffers: HandoffBuffers) -> None:
        if self._buffers is not buffers:
            self._call = buffers.call(self.courier.queue, self.layer.experts)
            self._buffers = buffers
