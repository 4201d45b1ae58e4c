"""What the user names as a source for a repair: a directory, a URL, or a hub id."""

from pathlib import Path

from kttools.model_source import HUB_ID

from .byte_source import open_source
from .repair import BlockSupplier, Supplier


def open_supplier(text: str) -> Supplier:
    """Raises UsageError for what is none of them, DownloadError when the hub cannot be asked."""
    if HUB_ID.fullmatch(text) and not Path(text).exists():
        from .hub.source import HubSource

        return HubSource(text)
    return BlockSupplier(open_source(text))
