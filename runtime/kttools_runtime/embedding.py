"""The embedding: a tensor looked up by row, or ggml's blocks of which only the rows asked for are decoded."""

import torch
from torch import Tensor

from .block_formats import BLOCKS_PART, dequantized
from .config import ModelConfig
from .shards import ShardWeights
from .weights import LinearWeights, WeightSource

EMBEDDING = "model.embed_tokens.weight"


class BlockRows:
    """A matrix in a block format, on the CPU, indexed as a tensor is."""

    __slots__ = ("matrix",)

    def __init__(self, matrix: LinearWeights) -> None:
        self.matrix = matrix

    def __getitem__(self, index: Tensor | int) -> Tensor:
        """float32 [hidden_size] of one row, [T, hidden_size] of T."""
        rows = torch.as_tensor(index).reshape(-1)
        values = dequantized(self.matrix.format, self.matrix.parts[BLOCKS_PART][rows.cpu()])
        return values[0] if isinstance(index, int) else values


Embedding = Tensor | BlockRows


def read_embedding(source: WeightSource, config: ModelConfig) -> Embedding:
    """As the shards hold it. Raises as the source does."""
    shape = config.vocab_size, config.hidden_size
    base = EMBEDDING.removesuffix(".weight")
    if isinstance(source, ShardWeights) and base in source.formats:
        return BlockRows(source.linear(base, *shape))
    return source.tensor(EMBEDDING, shape)


def as_tensor(embedding: Embedding) -> Tensor:
    """[vocab_size, hidden_size], the blocks in float32."""
    return embedding.matrix.dequantized() if isinstance(embedding, BlockRows) else embedding
