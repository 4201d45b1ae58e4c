"""Records what the runtime's own experts do: every choice, and each expert's output apart for some tokens.

The layer runs as it always does. For the observed tokens the engine runs once more, every (token, expert)
pair as a token of its own: the same kernels, so the pieces are what the layer's sum is made of.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kttools_runtime.moe import MoELayer, RoutedExperts

# Expert outputs held at a time, in bytes. Few blocks: each reads the weights of its experts again.
OUTPUT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Choices:
    """What the router chose for every token: expert_ids int64 and weights float32, both [T, K]."""

    expert_ids: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Observation:
    """The observed tokens of one MoE layer, choices in the router's order. S tokens, K choices.

    expert_ids int64 [S, K]; weights float32 [S, K]; gram float32 [S, K, K], the inner products of the
    weighted outputs y_r = w_r o_r.
    """

    expert_ids: Tensor
    weights: Tensor
    gram: Tensor


class Recorder:
    """Watches a layer and keeps what its last call showed.

    rows: the tokens to observe, int64 [S]; None: all. The caller sets it before each call.
    """

    def __init__(self, experts: RoutedExperts) -> None:
        self._experts = experts
        self.rows: Tensor | None = None
        self._choices: Choices | None = None
        self._observation: Observation | None = None

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> None:
        """x [T, hidden_size] float32, ids int64 and weights float32 [T, K]: what goes to the experts."""
        self._choices = Choices(expert_ids, expert_weights)
        if self.rows is not None:
            x, expert_ids, expert_weights = x[self.rows], expert_ids[self.rows], expert_weights[self.rows]
        self._observation = self._observe(x.to(self._experts.input_dtype), expert_ids, expert_weights)

    def take(self) -> Observation:
        """The last call's observation, handed over."""
        seen, self._observation = self._observation, None
        if seen is None:
            raise AssertionError("the layer has not run since the last take()")
        return seen

    def take_choices(self) -> Choices:
        """The last call's choices, handed over."""
        chosen, self._choices = self._choices, None
        if chosen is None:
            raise AssertionError("the layer has not run since the last take_choices()")
        return chosen

    def _observe(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Observation:
        num_tokens, k = expert_ids.shape
        gram = torch.empty(num_tokens, k, k)
        block = max(1, OUTPUT_BYTES // (4 * k * x.shape[1]))
        for start in range(0, num_tokens, block):
            rows = slice(start, start + block)
            parts = self._parts(x[rows], expert_ids[rows], weights[rows])
            torch.bmm(parts, parts.transpose(1, 2), out=gram[rows])
        return Observation(expert_ids, weights, gram)

    def _parts(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """y_r of every token, [S, K, hidden_size]."""
        num_tokens, k = expert_ids.shape
        # A copy of the expanded view takes a quarter of repeat_interleave's time.
        repeated = x[:, None].expand(-1, k, -1).reshape(num_tokens * k, -1)
        outputs = self._experts.layer.forward(repeated, expert_ids.reshape(-1, 1), weights.reshape(-1, 1))
        return outputs.view(num_tokens, k, -1)


@contextlib.contextmanager
def recording(moe: MoELayer) -> Iterator[Recorder]:
    """The layer is watched while the block runs."""
    recorder = Recorder(moe.experts)
    moe.watch = recorder
    try:
        yield recorder
    finally:
        moe.watch = None
