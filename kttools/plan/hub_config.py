"""A hub id's config.json, which is all a plan needs: fetched alone, kept in a cache of our own."""

from pathlib import Path

from kttools.bundle.atomic import atomic_write_bytes
from kttools.dirs import cache_dir
from kttools.model_source import CONFIG, HUB_ID, resolve_model
from kttools_runtime.errors import DownloadError

MAX_CONFIG_BYTES = 16 << 20


def model_path(text: str) -> Path:
    """The directory or file MODEL names; of a hub id that is not in the local cache a directory with its
    config.json alone.

    HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN hold as in every download. Without the hub, what an earlier plan
    fetched. Raises InvalidInputError and DownloadError.
    """
    try:
        return resolve_model(text, may_fetch=False)
    except DownloadError:
        if not HUB_ID.fullmatch(text):
            raise
    folder = cache_dir() / "configs" / text.replace("/", "--")
    try:
        data = _fetch(text)
    except DownloadError:
        if (folder / CONFIG).is_file():
            return folder
        raise
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(folder / CONFIG, data)
    return folder


def _fetch(repo_id: str) -> bytes:
    from kttools.bundle.hub.client import Hub

    return Hub(repo_id).read(CONFIG, MAX_CONFIG_BYTES)
