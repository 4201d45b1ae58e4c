"""The GGUF architectures we know, by general.architecture."""

from kttools.checkpoint.gguf.metadata import Metadata
from kttools_runtime.errors import UnsupportedModelError

from . import deepseek2, glm4moe, gptoss, llama, qwen2moe, qwen3moe
from .base import Architecture, Transform

__all__ = ["ARCHITECTURES", "Architecture", "Transform", "architecture_of"]

ARCHITECTURES: tuple[Architecture, ...] = (
    deepseek2.ARCHITECTURE,
    qwen3moe.ARCHITECTURE,
    qwen2moe.ARCHITECTURE,
    glm4moe.ARCHITECTURE,
    llama.ARCHITECTURE,
    gptoss.ARCHITECTURE,
)
KEY = "general.architecture"


def architecture_of(metadata: Metadata) -> Architecture:
    """Raises InvalidInputError (no architecture) or UnsupportedModelError, which lists the supported ones."""
    name = metadata.text(KEY)
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    supported = ", ".join(entry.name for entry in ARCHITECTURES)
    raise UnsupportedModelError(
        f"{metadata.where}: {KEY} {name!r:.80} is not supported; supported: {supported}"
    )
