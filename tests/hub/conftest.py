"""A running stand-in of the hub that huggingface_hub talks to, in this process and in started ones."""

import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from kttools.bundle.hub import fetch
from tests.hub.stand_in import StandIn

REPO_ID = "org/nano"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """Empty; HF_ENDPOINT and HF_HUB_CACHE point at it and at an empty folder, waiting is short."""
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.01)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with StandIn().running() as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.endpoint)
        template = stand_in.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield stand_in
        huggingface_hub.close_session()


@pytest.fixture
def environment(hub: StandIn, tmp_path: Path) -> dict[str, str]:
    """For started processes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KTTOOLS_", "HF_"))}
    return {
        **kept,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_HUB_DISABLE_XET": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }
