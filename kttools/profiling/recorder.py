"""Records what the runtime's own experts do: each expert's output apart, with the engine's own numerics.

The engine is asked for every (token, expert) pair as a token of its own; the same experts see the
same rows, so the work is the same, and the layer's result is summed here from the pieces.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kttools_runtime.moe import ExpertLayer, MoELayer, RoutedExperts

# Expert outputs held at a time, in bytes; 4 and 32 MiB took the same time.
OUTPUT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Observation:
    """One MoE layer on one window, choices in the router's order. T tokens, K choices.

    expert_ids int64 [T, K]; weights float32 [T, K]; gram float32 [T, K, K], the inner products of the
    weighted outputs y_r = w_r o_r.
    """

    expert_ids: Tensor
    weights: Tensor
    gram: Tensor


class RecordingExperts:
    """Stands in for a layer's engine: the same result, and an Observation of the last call."""

    def __init__(self, inner: ExpertLayer) -> None:
        self.inner = inner
        self.observation: Observation | None = None

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        num_tokens, k = expert_ids.shape
        routed = torch.empty(num_tokens, x.shape[1])
        gram = torch.empty(num_tokens, k, k)
        block = max(1, OUTPUT_BYTES // (4 * k * x.shape[1]))
        for start in range(0, num_tokens, block):
            rows = slice(start, start + block)
            parts = self._parts(x[rows], expert_ids[rows], expert_weights[rows])
            torch.sum(parts, dim=1, out=routed[rows])
            torch.bmm(parts, parts.transpose(1, 2), out=gram[rows])
        self.observation = Observation(expert_ids, expert_weights, gram)
        return routed

    def take(self) -> Observation:
        """The last call's observation, handed over."""
        seen, self.observation = self.observation, None
        if seen is None:
            raise AssertionError("the layer has not run since the last take()")
        return seen

    def _parts(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """y_r of every token, [T, K, hidden_size]."""
        num_tokens, k = expert_ids.shape
        # A copy of the expanded view takes a quarter of repeat_interleave's time.
        repeated = x[:, None].expand(-1, k, -1).reshape(num_tokens * k, -1)
        outputs = self.inner.forward(repeated, expert_ids.reshape(-1, 1), weights.reshape(-1, 1))
        return outputs.view(num_tokens, k, -1)


@contextlib.contextmanager
def recording(moe: MoELayer) -> Iterator[RecordingExperts]:
    """The layer records while the block runs; the engine is put back whatever happens."""
    plain = moe.experts
    recorder = RecordingExperts(plain.layer)
    moe.experts = RoutedExperts(recorder, plain.input_dtype)
    try:
        yield recorder
    finally:
        moe.experts = plain
