"""The key/value cache of a model spread over devices."""

from collections.abc import Sequence

import torch

from kttools_runtime.cache import KVCache
from kttools_runtime.config import ModelConfig

from .decode import DecodeStep


class HybridCache(KVCache):
    """Every layer's rows on its device, zeroed: a captured step looks at rows beyond the last token under a
    mask, and what was never written might not be a number."""

    __slots__ = ("generation", "step")

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, devices: Sequence[torch.device]
    ) -> None:
        super().__init__(config, 1, dtype, torch.device("meta"))
        self.capacity = capacity
        self.layers = [
            torch.zeros(capacity, config.cache_width, dtype=dtype, device=device) for device in devices
        ]
        self.step: DecodeStep | None = None  # made for these tensors at the first decode
        self.generation = 0
