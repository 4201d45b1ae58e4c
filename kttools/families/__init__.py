"""Model families: config.json and tensor names in, canonical config and roles out.

A family is chosen by `architectures`, or by `model_type` when a config names no architecture.
"""

from pathlib import Path
from typing import Any

from kttools.checkpoint import open_checkpoint
from kttools.checkpoint.gguf import is_gguf, open_gguf
from kttools_runtime import strict_json
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError, UnsupportedModelError

from . import deepseek_v2, deepseek_v3, glm4_moe, gpt_oss, mixtral, qwen2_moe, qwen3_moe
from .base import Family, Role, TensorSpec
from .canonical import canonical_tensors
from .declared import DeclaredWeights
from .source import SourceModel, TensorSource

__all__ = [
    "FAMILIES",
    "Family",
    "Role",
    "SourceModel",
    "TensorSource",
    "TensorSpec",
    "canonical_tensors",
    "detect",
    "open_config",
    "open_model",
]

FAMILIES: tuple[Family, ...] = (
    deepseek_v3.FAMILY,
    deepseek_v2.FAMILY,
    qwen3_moe.FAMILY,
    qwen2_moe.FAMILY,
    mixtral.FAMILY,
    glm4_moe.FAMILY,
    gpt_oss.FAMILY,
)
MAX_CONFIG_BYTES = 10_000_000


def detect(config: dict[str, Any], where: str = "config.json") -> Family:
    """The family of a parsed config.json. UnsupportedModelError lists the supported architectures."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(item, str) for item in architectures):
        raise InvalidInputError(
            f"{where}: architectures must be a list of strings, got {architectures!r:.80}"
        )
    model_type = config.get("model_type")
    for family in FAMILIES:
        if architectures and set(architectures) <= set(family.architectures):
            return family
        if not architectures and model_type in family.model_types:
            return family
    got = ", ".join(architectures) or f"model_type {model_type!r}"
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise UnsupportedModelError(f"{where}: architecture {got:.200} is not supported; supported: {supported}")


def open_model(path: str | Path, gguf_path: str | Path | None = None) -> SourceModel:
    """Opens a Hugging Face directory (or a file in it) or a GGUF model (a file, a split, their directory).

    gguf_path: takes the weights from there, and config and tokenizer from `path`. Config and headers are read
    and checked, no data. Raises InvalidInputError, CorruptFileError or UnsupportedModelError, naming file and
    reason.
    """
    if gguf_path is None and is_gguf(Path(path)):
        return _open_gguf(Path(path))
    directory = Path(path)
    if directory.is_file():
        directory = directory.parent
    if not directory.is_dir():
        raise InvalidInputError(f"{path}: no such model directory")
    config_file = directory / "config.json"
    if (directory / "bundle.json").is_file() and not config_file.exists():
        raise InvalidInputError(f"{path}: is a bundle, not a checkpoint; name what it was made from")
    config, family, model_config, notices = _read_directory(config_file)
    if gguf_path is not None:
        gguf = open_gguf(gguf_path, with_tokenizer=False)
        notices += gguf.notices
        return SourceModel(Path(gguf_path), family, model_config, config, notices, gguf.weights, directory)
    checkpoint = family.view(open_checkpoint(directory, config.get("quantization_config"), str(config_file)))
    return SourceModel(directory, family, model_config, config, notices, checkpoint, directory)


def open_config(directory: Path) -> SourceModel:
    """The model a directory's config.json describes, weights or not: sizes only, a read raises."""
    config_file = directory / "config.json"
    config, family, model_config, notices = _read_directory(config_file)
    weights = DeclaredWeights(family, model_config, config_file)
    return SourceModel(directory, family, model_config, config, notices, weights, directory)


def _read_directory(config_file: Path) -> tuple[dict[str, Any], Family, ModelConfig, list[str]]:
    """config.json as it is, its family, the canonical config, and notices."""
    config = strict_json.read_object(config_file, MAX_CONFIG_BYTES)
    family = detect(config, str(config_file))
    readable = {key: value for key, value in config.items() if key != "quantization_config"}
    generation_file = config_file.parent / "generation_config.json"
    generation = (
        strict_json.read_object(generation_file, MAX_CONFIG_BYTES) if generation_file.exists() else {}
    )
    model_config, notices = _read_config(family, readable, generation, str(config_file))
    return config, family, model_config, notices


def _open_gguf(path: Path) -> SourceModel:
    """A GGUF model with the config and tokenizer its metadata give."""
    gguf = open_gguf(path)
    where = str(gguf.weights.files[0])
    family = detect(gguf.config, where)
    model_config, notices = _read_config(family, gguf.config, {}, where)
    notices += gguf.notices
    return SourceModel(
        path, family, model_config, gguf.config, notices, gguf.weights, None, gguf.tokenizer_data
    )


def _read_config(
    family: Family, config: dict[str, Any], generation: dict[str, Any], where: str
) -> tuple[ModelConfig, list[str]]:
    try:
        return family.read_config(config, generation, where)
    except InvalidInputError as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from None
