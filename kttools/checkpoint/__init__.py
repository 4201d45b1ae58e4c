"""Reading what people have, behind one lazy interface: names, shapes, one tensor at a time.

`open_checkpoint(path)` chooses the reader; today there is one, safetensors.
"""

from pathlib import Path

from kttools_runtime.safetensors_file import TensorInfo

from .safetensors import Checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint of any readable kind. Raises InvalidInputError or CorruptFileError."""
    return Checkpoint.open(path)
