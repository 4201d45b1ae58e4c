"""The decoder: embedding, layers, norm, head, and the calls a user makes on it."""

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import LatentAttention, Step
from .cache import KVCache
from .config import ModelConfig
from .embedding import Embedding, as_tensor, read_embedding
from .errors import InvalidInputError, UsageError
from .gqa import GroupedQueryAttention
from .layer_stream import LayerStream
from .linear import Linear, LinearSpec, Placement, TorchLinear
from .mlp import GatedMLP
from .moe import MoELayer, RoutedExperts
from .norm import RMSNorm
from .preload import PackReader
from .rope import Rope
from .step import NativeHalves
from .torch_threads import set_threads_for_logits, set_torch_threads

if TYPE_CHECKING:
    from .expert_table import ExpertTable
    from .generate import FinishReason
    from .tokenizer import Tokenizer

# Tokens per prefill step: enough rows per expert for AMX, little enough activation memory (a [1024, 32k] mask
# is 64 MiB in bf16). Attention re-expands the context once per step, so much smaller steps cost time.
DEFAULT_CHUNK_SIZE = 1024
# Cache length when nobody says: what chat needs, not what max_position_embeddings would reserve.
DEFAULT_CACHE_LEN = 32768

Attention = LatentAttention | GroupedQueryAttention


class DecoderLayer:
    """One transformer layer; the residual stream is float32."""

    __slots__ = ("attention", "attention_norm", "mlp", "mlp_norm", "native")

    def __init__(
        self,
        attention_norm: RMSNorm,
        attention: Attention,
        mlp_norm: RMSNorm,
        mlp: GatedMLP | MoELayer,
    ) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.native: NativeHalves | None = None

    def torch_threads(self, threads: int, num_tokens: int) -> int:
        """Of `threads`, those that torch's own operations may take for so many tokens: one where attention is
        the kernels', because an idle team of OpenMP waits by spinning and takes a core from our pool (3.5 ms
        of a decode step of 68 on two cores)."""
        return 1 if self.native is not None and self.native.attends(num_tokens) else threads

    def attend(self, hidden: Tensor, step: Step, cache: Tensor) -> None:
        """hidden [num_tokens, hidden_size] is updated in place; so is this layer's cache."""
        if self.native is None or not self.native.attend(hidden, step, cache):
            hidden += self.attention(self.attention_norm(hidden), step, cache)

    def mix(self, hidden: Tensor) -> None:
        """The second half: hidden [num_tokens, hidden_size] is updated in place."""
        if self.native is None or not self.native.mix(hidden):
            hidden += self.mlp(self.mlp_norm(hidden))


class Model:
    """A loaded model. One forward pass at a time: the kernels' thread pool is not shared between callers.

    Made by `kttools_runtime.load` or `build_model`.
    """

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        embedding: Embedding,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        head: Linear,
        threads: int,
        cache_len: int | None = None,
        tokenizer_dir: Path | None = None,
    ) -> None:
        self.config = config
        self.device = placement.device
        self.dtype = placement.dtype
        self.threads = threads
        self.cache_len = cache_len or min(config.max_position_embeddings, DEFAULT_CACHE_LEN)
        self.layers = layers
        self._embedding = embedding
        self._norm = norm
        self._head = head
        self._rope = Rope(config, placement.device)
        self._tokenizer_dir = tokenizer_dir
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> "Tokenizer":
        """The model's own tokenizer and chat template, read on first use."""
        if self._tokenizer is None:
            from .tokenizer import Tokenizer

            if self._tokenizer_dir is None:
                raise UsageError("this model was built from weights alone and has no tokenizer")
            self._tokenizer = Tokenizer(self._tokenizer_dir)
        return self._tokenizer

    @property
    def moe_layers(self) -> dict[int, MoELayer]:
        """The MoE layers by model layer index; of a model with streamed layers all at once, too."""
        return {i: moe for i, layer in enumerate(self.layers) if (moe := _moe(layer))}

    def fingerprint(self) -> str:
        """What an expert table for this model carries (see expert_table.model_fingerprint)."""
        from .expert_table import model_fingerprint

        # By index, because a loop variable would hold a streamed layer while the next is built.
        tensors = {i: _router_tensors(self.layers[i]) for i in self.config.moe_layers}
        return model_fingerprint(self.config, tensors)

    def use_table(self, table: "str | Path | ExpertTable | None") -> None:
        """Apply an expert table (a file, or one already read) from now on; None: the native router.

        Raises InvalidInputError for another model's table, CorruptFileError for a broken one, UsageError
        while layers are streamed.
        """
        from .expert_table import read_table

        if isinstance(self.layers, LayerStream):
            raise UsageError("an expert table cannot be used while layers are streamed: load the model whole")
        if isinstance(table, (str, Path)):
            table = read_table(table, self.config, self.fingerprint())
        for index, layer in self.moe_layers.items():
            layer.router.table = (
                None if table is None else table.policies[index].to(layer.router.weight.device)
            )

    def pack_reader(self) -> PackReader:
        """What reads the experts' packs into memory; it is not started yet."""
        return PackReader({index: moe.experts.layer for index, moe in self.moe_layers.items()})

    def new_cache(self, cache_len: int | None = None) -> KVCache:
        """An empty cache for `cache_len` tokens (default: the model's cache_len)."""
        capacity = self.cache_len if cache_len is None else cache_len
        if capacity < 1:
            raise UsageError(f"cache_len must be positive, got {capacity}")
        return KVCache(self.config, capacity, self.dtype, self.device)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int] | Tensor, chunk_size: int | None = None) -> Tensor:
        """Teacher-forced: float32 [T, vocab_size], row t predicting token t + 1. Independent of any cache."""
        tokens = self._checked_tokens(token_ids)
        cache = self.new_cache(len(tokens))
        out = torch.empty(len(tokens), self.config.vocab_size, device=self.device)
        for start, chunk in self._chunks(tokens, chunk_size):
            out[start : start + len(chunk)] = self._head(self._norm(self._forward(chunk, cache)))
        set_threads_for_logits(self.threads, *out.shape)
        return out

    @torch.inference_mode()
    def prefill(
        self, token_ids: Sequence[int] | Tensor, cache: KVCache, chunk_size: int | None = None
    ) -> Tensor:
        """Append token_ids to the cache, chunk_size at a time; float32 [vocab_size] after the last of them.

        Raises InvalidInputError when there are none, one is outside the vocabulary, or they do not fit.
        """
        tokens = self._checked_tokens(token_ids)
        cache.check_room(len(tokens))
        for _, chunk in self._chunks(tokens, chunk_size):
            hidden = self._forward(chunk, cache)
        return self._head(self._norm(hidden[-1:]))[0]

    @torch.inference_mode()
    def decode(self, token_id: int, cache: KVCache) -> Tensor:
        """Append one token; float32 [vocab_size] predicting the next."""
        if not 0 <= token_id < self.config.vocab_size:
            raise self._outside_vocabulary(token_id)
        cache.check_room(1)
        token = torch.tensor([token_id], device=self.device)
        return self._head(self._norm(self._forward(token, cache)))[0]

    def generate(
        self,
        token_ids: Sequence[int],
        max_new_tokens: int,
        *,
        cache: KVCache | None = None,
        stop_ids: Sequence[int] | None = None,
        chunk_size: int | None = None,
        history: Sequence[int] = (),
        should_stop: Callable[[], bool] | None = None,
        **sampling: Any,
    ) -> "Generator[int, None, FinishReason]":
        """Yields token ids; `sampling` are the fields of SamplingParams (temperature=0.0 is greedy).

        See kttools_runtime.generate.generate for the rest.
        """
        from .generate import generate
        from .sampling import SamplingParams

        return generate(
            self,
            token_ids,
            max_new_tokens,
            SamplingParams(**sampling),
            stop_ids=stop_ids,
            cache=cache,
            chunk_size=chunk_size,
            history=history,
            should_stop=should_stop,
        )

    def _forward(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """tokens int64 [T] at the cache's end -> hidden [T, hidden_size] float32 before the last norm."""
        start, num_tokens = cache.length, tokens.shape[0]
        step = Step(start, num_tokens, self._rope.rotations(start, num_tokens))
        hidden = self._embedding[tokens].to(torch.float32)
        for layer, rows in zip(self.layers, cache.layers, strict=True):
            threads = layer.torch_threads(self.threads, num_tokens)
            set_torch_threads(self.config, self.dtype, threads, start, num_tokens)
            layer.attend(hidden, step, rows)
            layer.mix(hidden)
        cache.length = start + num_tokens
        return hidden

    def _chunks(self, tokens: Tensor, chunk_size: int | None) -> list[tuple[int, Tensor]]:
        size = DEFAULT_CHUNK_SIZE if chunk_size is None else chunk_size
        if size < 1:
            raise UsageError(f"chunk_size must be positive, got {size}")
        return [(start, tokens[start : start + size]) for start in range(0, len(tokens), size)]

    def _checked_tokens(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        tokens = torch.as_tensor(token_ids)
        if tokens.numel() == 0:
            raise InvalidInputError("the prompt is empty: give at least one token")
        if tokens.dim() != 1 or tokens.is_floating_point():
            raise InvalidInputError(
                f"token ids must be a list of integers, got {tokens.dtype} {list(tokens.shape)}"
            )
        tokens = tokens.to(device=self.device, dtype=torch.int64)
        for extreme in (int(tokens.min()), int(tokens.max())):
            if not 0 <= extreme < self.config.vocab_size:
                raise self._outside_vocabulary(extreme)
        return tokens

    def _outside_vocabulary(self, token_id: int) -> InvalidInputError:
        return InvalidInputError(f"token id {token_id} is outside the vocabulary of {self.config.vocab_size}")


def build_model(
    config: ModelConfig,
    placement: Placement,
    experts: Callable[[int], RoutedExperts],
    *,
    threads: int,
    cache_len: int | None = None,
    num_experts: int | None = None,
    tokenizer_dir: Path | None = None,
    stream_layers: bool = False,
) -> Model:
    """A model from canonical weights. experts(layer): the routed experts of a model layer.

    stream_layers: each layer is built when it is used, and one is held (see layer_stream).

    Raises UsageError for a num_experts the router cannot give, InvalidInputError for weights that do not fit.
    """
    if num_experts is not None and not 1 <= num_experts <= config.num_experts_per_tok:
        raise UsageError(f"num_experts must be in 1..{config.num_experts_per_tok}, got {num_experts}")
    hidden_size = config.hidden_size
    embedding = read_embedding(placement.source, config)
    if placement.device.type != "cpu":
        embedding = as_tensor(embedding).to(placement.device)

    def build(index: int) -> DecoderLayer:
        return build_layer(config, placement, index, experts, num_experts)

    count = config.num_hidden_layers
    layers = LayerStream(build, count) if stream_layers else [build(index) for index in range(count)]
    head: Linear
    if config.tie_word_embeddings:
        # One tensor for both; the kernels' packed form would be a second copy.
        embedding = as_tensor(embedding).to(device=placement.device, dtype=placement.dtype)
        head = TorchLinear(embedding)
    else:
        head = placement.linear(LinearSpec("lm_head", config.vocab_size), hidden_size)
    final_norm = build_norm(config, placement, "model.norm")
    return Model(config, placement, embedding, layers, final_norm, head, threads, cache_len, tokenizer_dir)


def build_layer(
    config: ModelConfig,
    placement: Placement,
    index: int,
    experts: Callable[[int], RoutedExperts],
    num_experts: int | None,
) -> DecoderLayer:
    prefix = f"model.layers.{index}"
    attention = _attention(config, placement, index)
    mlp: GatedMLP | MoELayer
    if config.is_moe(index):
        mlp = MoELayer(config, placement, f"{prefix}.mlp", experts(index), num_experts)
    else:
        mlp = GatedMLP(placement, f"{prefix}.mlp", config.hidden_size, config.intermediate_size)
    before = build_norm(config, placement, f"{prefix}.input_layernorm")
    between = build_norm(config, placement, f"{prefix}.post_attention_layernorm")
    layer = DecoderLayer(before, attention, between, mlp)
    if placement.uses_cpu_kernels:
        layer.native = NativeHalves(placement.pool, layer)
    return layer


def build_norm(config: ModelConfig, placement: Placement, name: str) -> RMSNorm:
    return RMSNorm(placement.vector(f"{name}.weight", config.hidden_size), config.rms_norm_eps)


def _moe(layer: DecoderLayer) -> MoELayer | None:
    return layer.mlp if isinstance(layer.mlp, MoELayer) else None


def _router_tensors(layer: DecoderLayer) -> tuple[Tensor, ...]:
    moe = _moe(layer)
    if moe is None:
        raise AssertionError("config.moe_layers names a dense layer")
    return moe.router.tensors


def _attention(config: ModelConfig, placement: Placement, layer: int) -> Attention:
    prefix = f"model.layers.{layer}.self_attn"
    if config.attention == "mla":
        return LatentAttention(config, placement, prefix)
    return GroupedQueryAttention(config, placement, prefix, config.window(layer))
