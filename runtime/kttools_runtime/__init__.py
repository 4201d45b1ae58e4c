"""kttools_runtime: the lean runtime. It maps a bundle and computes; it never converts.

    import kttools_runtime as kt
    model = kt.load("BUNDLE")
    engine = kt.ExpertEngine(threads=2)

Every public name is imported on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .cache import KVCache
    from .config import ModelConfig
    from .errors import (
        CorruptFileError,
        DownloadError,
        EngineError,
        HardwareError,
        InvalidInputError,
        KTError,
        PackFormatError,
        QualityGateError,
        ResourceError,
        UnsupportedModelError,
        UsageError,
    )
    from .experts import ExpertEngine, available_isas
    from .loader import load
    from .model import Model

# The loader's file is not called load.py: importing a submodule sets its name on the package and would
# replace the function of the same name.
_HOME = {
    "load": "loader",
    "Model": "model",
    "KVCache": "cache",
    "ModelConfig": "config",
    "ExpertEngine": "experts",
    "available_isas": "experts",
    "KTError": "errors",
    "EngineError": "errors",
    "UsageError": "errors",
    "InvalidInputError": "errors",
    "CorruptFileError": "errors",
    "PackFormatError": "errors",
    "UnsupportedModelError": "errors",
    "ResourceError": "errors",
    "HardwareError": "errors",
    "QualityGateError": "errors",
    "DownloadError": "errors",
}

__all__ = [
    "CorruptFileError",
    "DownloadError",
    "EngineError",
    "ExpertEngine",
    "HardwareError",
    "InvalidInputError",
    "KTError",
    "KVCache",
    "Model",
    "ModelConfig",
    "PackFormatError",
    "QualityGateError",
    "ResourceError",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "available_isas",
    "load",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
