"""Model families: config.json and tensor names in, canonical config and roles out.

A family is chosen by `architectures`, or by `model_type` when a config names no architecture.
"""

from pathlib import Path
from typing import Any

from kttools.checkpoint import open_checkpoint
from kttools_runtime import strict_json
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError, UnsupportedModelError

from . import deepseek_v3
from .base import Family, Role, TensorSpec
from .canonical import canonical_tensors
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
    "open_model",
]

FAMILIES: tuple[Family, ...] = (deepseek_v3.FAMILY,)
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


def open_model(path: str | Path) -> SourceModel:
    """Opens a Hugging Face directory (or a file in it): config and headers are read and checked, no data.

    Raises InvalidInputError, CorruptFileError or UnsupportedModelError, naming file and reason.
    """
    directory = Path(path)
    if directory.is_file():
        directory = directory.parent
    if not directory.is_dir():
        raise InvalidInputError(f"{path}: no such model directory")
    config_file = directory / "config.json"
    config = strict_json.read_object(config_file, MAX_CONFIG_BYTES)
    family = detect(config, str(config_file))
    readable = {key: value for key, value in config.items() if key != "quantization_config"}
    model_config, notices = _read_config(family, readable, config_file)
    checkpoint = open_checkpoint(directory, config.get("quantization_config"), str(config_file))
    return SourceModel(directory, family, model_config, config, notices, checkpoint, directory)


def _read_config(family: Family, config: dict[str, Any], config_file: Path) -> tuple[ModelConfig, list[str]]:
    generation_file = config_file.parent / "generation_config.json"
    generation = (
        strict_json.read_object(generation_file, MAX_CONFIG_BYTES) if generation_file.exists() else {}
    )
    where = str(config_file)
    try:
        return family.read_config(config, generation, where)
    except InvalidInputError as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from None
