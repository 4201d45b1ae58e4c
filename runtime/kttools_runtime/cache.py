"""The key/value cache."""

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import InvalidInputError


class KVCache:
    """One sequence. Per layer [capacity, cache_width], a row per token.

    Attention mla: the normed latent, then the rotated key. gqa: the rotated keys of all key heads, then the
    values.

    Memory is reserved, not touched: an operating system that commits lazily charges only for the tokens held.
    """

    __slots__ = ("capacity", "layers", "length")

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        width = config.cache_width
        self.capacity = capacity
        self.length = 0
        self.layers: list[Tensor] = [
            torch.empty(capacity, width, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.element_size() * layer.shape[1] for layer in self.layers)

    def check_room(self, num_tokens: int) -> None:
        """Raises InvalidInputError unless num_tokens more fit."""
        if self.length + num_tokens > self.capacity:
            held = f" after the {self.length} it holds" if self.length else ""
            raise InvalidInputError(
                f"{num_tokens} tokens do not fit into the cache of {self.capacity}{held}; "
                "shorten the prompt or raise --cache_lens"
            )

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on, so that a shared prefix is computed once."""
        if not 0 <= length <= self.length:
            raise InvalidInputError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length
