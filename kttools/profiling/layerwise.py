"""The runtime's model, one layer at a time: what recording, forks and layer streaming have in common.

A window is a piece of one document of at most MAX_WINDOW_TOKENS tokens; attention does not cross windows. A
batch is some windows one after the other: everything but attention runs on all of them at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kttools_runtime.attention import Step
from kttools_runtime.config import ModelConfig
from kttools_runtime.expert_policy import LayerPolicy
from kttools_runtime.model import DecoderLayer, Model
from kttools_runtime.moe import MoELayer
from kttools_runtime.rope import Rope
from kttools_runtime.routing import LayerTable
from kttools_runtime.torch_threads import set_threads_for_logits, set_torch_threads

MAX_WINDOW_TOKENS = 2048
# Tokens of a batch: short documents share the experts' calls (ds3-tiny: 235 tokens on average).
BATCH_TOKENS = 2048
# Policies by MoE layer; a layer that is not in it runs the native router.
Policies = dict[int, LayerPolicy]


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that are computed together. document: what the bootstrap draws."""

    domain: str
    document: str
    token_ids: Tensor


class HasTokens(Protocol):
    """A document as kttools.profiling.data yields it."""

    @property
    def domain(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...


def windows(documents: Iterable[HasTokens], window_tokens: int) -> Iterator[Window]:
    """Documents cut into windows; a rest of one token is dropped, it predicts nothing."""
    for document in documents:
        ids = torch.as_tensor(document.token_ids, dtype=torch.int64)
        for start in range(0, len(ids), window_tokens):
            piece = ids[start : start + window_tokens]
            if len(piece) > 1:
                yield Window(document.domain, document.id, piece)


def batches(chosen: Iterable[Window]) -> Iterator[list[Window]]:
    """Windows in order, in groups of at most BATCH_TOKENS (a longer window is a batch of its own)."""
    batch: list[Window] = []
    tokens = 0
    for window in chosen:
        if batch and tokens + len(window.token_ids) > BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(window)
        tokens += len(window.token_ids)
    if batch:
        yield batch


class LayerRunner:
    """Runs the layers of a loaded model on whole windows; hidden is [num_tokens, hidden_size] float32."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.config: ModelConfig = model.config
        self.fingerprint = model.fingerprint()
        self._rope = Rope(model.config, model.device)
        self._width = self.config.cache_width
        self._step: Step | None = None

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    def layer(self, index: int) -> DecoderLayer:
        return self.model.layers[index]

    def moe(self, index: int) -> MoELayer | None:
        """The MoE layer at a model layer index; None for a dense one."""
        mlp = self.layer(index).mlp
        return mlp if isinstance(mlp, MoELayer) else None

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        return self.model._embedding[token_ids.to(self.model.device)].to(torch.float32)

    @torch.inference_mode()
    def run(
        self,
        index: int,
        hidden: Tensor,
        policy: LayerTable | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """One layer, in place, on one window or (lengths: their tokens) on several one after the other.

        policy: what its router keeps (None: the native choice).
        """
        layer, moe = self.layer(index), self.moe(index)
        start = 0
        for length in [hidden.shape[0]] if lengths is None else lengths:
            self._attend(layer, hidden[start : start + length])
            start += length
        if moe is not None:
            moe.router.table = policy
        try:
            layer.mix(hidden)
        finally:
            if moe is not None:
                moe.router.table = None

    def _attend(self, layer: DecoderLayer, hidden: Tensor) -> None:
        num_tokens = hidden.shape[0]
        cache = torch.empty(num_tokens, self._width, dtype=self.model.dtype, device=hidden.device)
        threads = layer.torch_threads(self.model.threads, num_tokens)
        set_torch_threads(self.config, self.model.dtype, threads, 0, num_tokens)
        layer.attend(hidden, self._window_step(num_tokens), cache)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [num_tokens, vocab_size]."""
        set_threads_for_logits(self.model.threads, len(hidden), self.config.vocab_size)
        return self.model._head(self.model._norm(hidden))

    def _window_step(self, num_tokens: int) -> Step:
        if self._step is None or self._step.num_tokens != num_tokens:
            self._step = Step(0, num_tokens, self._rope.rotations(0, num_tokens))
        return self._step


def forward(runner: LayerRunner, token_ids: Tensor, policies: Policies) -> Tensor:
    """Hidden states of one window after the last layer."""
    hidden = runner.embed(token_ids)
    for index in range(runner.num_layers):
        runner.run(index, hidden, policies.get(index))
    return hidden
