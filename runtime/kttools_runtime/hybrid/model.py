"""A model whose dense part is on devices and whose routed experts are on the CPU."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kttools_runtime.attention import Step
from kttools_runtime.cache import KVCache
from kttools_runtime.config import ModelConfig
from kttools_runtime.embedding import Embedding
from kttools_runtime.errors import InvalidInputError, UsageError
from kttools_runtime.linear import Linear, Placement
from kttools_runtime.mlp import GatedMLP
from kttools_runtime.model import DecoderLayer, Model
from kttools_runtime.norm import RMSNorm
from kttools_runtime.preload import PackReader
from kttools_runtime.rope import Rope
from kttools_runtime.torch_threads import set_torch_threads

from .cache import HybridCache
from .decode import DecodeStep
from .handoff import Courier, HandoffBuffers
from .mixture import Mixture
from .options import HybridOptions

if TYPE_CHECKING:
    from kttools_runtime.expert_table import ExpertTable


class HybridModel(Model):
    """Chunks of a prompt go layer by layer; single tokens go through captured steps (decode.py).

    embedding: on the CPU, a row of it travels. layer_devices: the index of each layer's device.
    """

    def __init__(
        self,
        config: ModelConfig,
        placements: Sequence[Placement],
        embedding: Embedding,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        head: Linear,
        threads: int,
        cache_len: int | None,
        tokenizer_dir: Path | None,
        *,
        options: HybridOptions,
        layer_devices: list[int],
        mixtures: dict[int, Mixture],
        courier: Courier,
    ) -> None:
        super().__init__(
            config, placements[0], embedding, layers, norm, head, threads, cache_len, tokenizer_dir
        )
        self.options = options
        self.devices = options.devices
        self.layer_devices = layer_devices
        self.mixtures = mixtures
        self.courier = courier
        self.ropes = [Rope(config, device) for device in options.devices.torch_devices]
        self._generation = 0
        self._buffers: dict[torch.dtype, HandoffBuffers] = {}

    def pack_reader(self) -> PackReader:
        """As Model.pack_reader(); experts on devices are left out."""
        hot = {index: own.hot.experts for index, own in self.mixtures.items() if own.hot is not None}
        layers = {index: moe.experts.layer for index, moe in self.moe_layers.items()}
        return PackReader(layers, hot)

    def device_of(self, layer: int) -> torch.device:
        return self.devices.torch_devices[self.layer_devices[layer]]

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [T, hidden_size] on the last device -> float32 [T, vocab_size]."""
        return self._head(self._norm(hidden))

    def use_table(self, table: "str | Path | ExpertTable | None") -> None:
        """As Model.use_table; captured steps are made anew."""
        super().use_table(table)
        self._generation += 1

    def use_deferral(self, count: int) -> None:
        """Another number of deferred experts (options.defer_experts); captured steps are made anew."""
        self.options = replace(self.options, defer_experts=count)
        self.options.check(self.config)
        for index, mixture in self.mixtures.items():
            mixture.defer = 0 if index == self.config.num_hidden_layers - 1 else count
        self._generation += 1

    def new_cache(self, cache_len: int | None = None) -> HybridCache:
        capacity = self.cache_len if cache_len is None else cache_len
        if capacity < 1:
            raise UsageError(f"cache_len must be positive, got {capacity}")
        devices = [self.device_of(layer) for layer in range(self.config.num_hidden_layers)]
        return HybridCache(self.config, capacity, self.dtype, devices)

    @torch.inference_mode()
    def decode(self, token_id: int, cache: KVCache) -> Tensor:
        """Append one token; float32 [vocab_size] predicting the next. Raises EngineError."""
        if not isinstance(cache, HybridCache):
            raise InvalidInputError("this cache was not made by this model's new_cache()")
        if not 0 <= token_id < self.config.vocab_size:
            raise self._outside_vocabulary(token_id)
        cache.check_room(1)
        set_torch_threads(self.config, self.dtype, self.threads, cache.length, 1)
        if cache.step is None or cache.generation != self._generation:
            cache.step = DecodeStep(self, cache.layers)
            cache.generation = self._generation
        logits = cache.step.run(self._embedding[token_id].to(torch.float32), cache.length)
        cache.length += 1
        return logits.clone()

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int] | Tensor, chunk_size: int | None = None) -> Tensor:
        """As Model.logits. With deferral every token is computed as decode would, the prompt's too."""
        tokens = self._checked_tokens(token_ids)
        cache = self.new_cache(len(tokens))
        out = torch.empty(len(tokens), self.config.vocab_size, device=self.device)
        for start, chunk in self._chunks(tokens, chunk_size):
            out[start : start + len(chunk)] = self.head(self._chunk(chunk, cache, is_deferring=True))
        return out

    def _forward(self, tokens: Tensor, cache: KVCache) -> Tensor:
        return self._chunk(tokens, cache, is_deferring=False)

    def _chunk(self, tokens: Tensor, cache: KVCache, is_deferring: bool) -> Tensor:
        """tokens int64 [T] at the cache's end -> hidden [T, hidden_size] float32 on the last device."""
        start, num_tokens = cache.length, tokens.shape[0]
        set_torch_threads(self.config, self.dtype, self.threads, start, num_tokens)
        self.courier.begin()
        steps = [Step(start, num_tokens, rope.rotations(start, num_tokens)) for rope in self.ropes]
        hidden = self._embedding[tokens.cpu()].to(torch.float32)
        late: Tensor | None = None
        for index, layer in enumerate(self.layers):
            hidden = hidden.to(self.device_of(index))
            step = steps[self.layer_devices[index]]
            hidden += layer.attention(layer.attention_norm(hidden), step, cache.layers[index])
            x = layer.mlp_norm(hidden)
            before, late = late, None
            if isinstance(layer.mlp, GatedMLP):
                hidden += layer.mlp(x)
            else:
                now, late = self.mixtures[index].chunk(x, self._buffers_for(index, num_tokens), is_deferring)
                hidden += now
            if before is not None:
                hidden += before.to(hidden.device)
        cache.length = start + num_tokens
        return hidden

    def _buffers_for(self, layer: int, num_tokens: int) -> HandoffBuffers:
        """Host buffers that all layers of one input dtype share, as large as the largest chunk so far."""
        dtype = torch.float32 if num_tokens == 1 else self.mixtures[layer].layer.experts.input_dtype
        held = self._buffers.get(dtype)
        if held is None or held.x.shape[0] < num_tokens:
            config = self.config
            held = HandoffBuffers(
                num_tokens, config.hidden_size, config.num_experts_per_tok, dtype, self.device.type == "cuda"
            )
            self._buffers[dtype] = held
        return held
