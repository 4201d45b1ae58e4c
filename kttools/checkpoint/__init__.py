"""Reading what people have, behind one lazy interface: names, shapes, one tensor at a time.

`open_checkpoint(path, quantization_config)` opens safetensors, plain or FP8.
"""

from pathlib import Path
from typing import Any

from kttools_runtime.safetensors_file import TensorInfo

from .base import Info, Stored, Weights
from .fp8 import Fp8Checkpoint, read_quantization_config
from .safetensors import Checkpoint

__all__ = ["Checkpoint", "Info", "Stored", "TensorInfo", "Weights", "open_checkpoint"]


def open_checkpoint(
    path: str | Path, quantization_config: Any = None, where: str = "config.json"
) -> Checkpoint | Fp8Checkpoint:
    """Opens safetensors; quantization_config: that of config.json (found at `where`), None when it has none.

    Raises InvalidInputError, CorruptFileError or UnsupportedModelError.
    """
    if isinstance(quantization_config, dict) and quantization_config.get("quant_method") == "mxfp4":
        return Checkpoint.open(path)  # a family that has such tensors decodes them
    block = read_quantization_config(quantization_config, where)
    plain = Checkpoint.open(path)
    return plain if block is None else Fp8Checkpoint(plain, block)
