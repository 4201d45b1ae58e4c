"""Where a user's own files go: the XDG base directories."""

import os
from pathlib import Path


def _base(variable: str, default: str) -> Path:
    """The XDG directory; a relative value is ignored, as the specification asks."""
    value = os.environ.get(variable, "")
    return Path(value) if os.path.isabs(value) else Path.home() / default


def cache_dir() -> Path:
    """Derived files that can be made again (bundles of quantised checkpoints, chat history). Not created."""
    return _base("XDG_CACHE_HOME", ".cache") / "kttools"


def config_dir() -> Path:
    """The user's configuration. Not created."""
    return _base("XDG_CONFIG_HOME", ".config") / "kttools"
