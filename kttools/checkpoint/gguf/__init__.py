"""GGUF files as checkpoints: `open_gguf(path)` gives config, tokenizer and tensors under the hub's names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architectures import architecture_of
from .splits import is_gguf, locate, open_files
from .vocabulary import end_ids, has_vocabulary, special_id, tokenizer_files
from .weights import GgufWeights

__all__ = ["GgufModel", "GgufWeights", "is_gguf", "locate", "open_gguf"]


@dataclass(frozen=True, slots=True)
class GgufModel:
    """config: the words of config.json; tokenizer_data: Hugging Face files by name, {} when not wanted."""

    weights: GgufWeights
    config: dict[str, Any]
    tokenizer_data: dict[str, bytes]
    notices: list[str]


def open_gguf(path: str | Path, with_tokenizer: bool = True) -> GgufModel:
    """Opens a file, its splits or a directory: headers are read and checked, no data.

    Raises InvalidInputError, CorruptFileError or UnsupportedModelError, naming file and reason.
    """
    files = open_files(path)
    metadata = files.metadata
    architecture = architecture_of(metadata)
    config, notices = architecture.config(metadata, files.tensors)
    embedding = files.tensors.get("token_embd.weight")
    config |= {
        "vocab_size": embedding.shape[0] if embedding else 0,
        "tie_word_embeddings": "output.weight" not in files.tensors,
        "hidden_act": "silu",
        "bos_token_id": special_id(metadata, "bos_token_id"),
        "eos_token_id": end_ids(metadata),
    }
    weights = GgufWeights(files, architecture)
    wanted = with_tokenizer and has_vocabulary(metadata)
    tokenizer_data = tokenizer_files(metadata) if wanted else {}
    return GgufModel(weights, config, tokenizer_data, notices + weights.notices)
