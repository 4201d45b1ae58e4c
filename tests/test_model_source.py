"""MODEL as users write it: directories, files, hub ids; and bundles made once in the cache."""

import json
import os
from pathlib import Path

import pytest

from kttools.dirs import cache_dir, config_dir
from kttools.model_source import ensure_bundle, fingerprint, resolve_model
from kttools_runtime.errors import DownloadError, InvalidInputError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "My Model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"x" * 100)
    return path


def fake_quantise(made: list[Path]):
    def quantise(source: Path, target: Path, weights: Path | None) -> None:
        target.mkdir()
        (target / "bundle.json").write_text("{}")
        made.append(target)

    return quantise


def test_directories_and_their_files(checkpoint: Path) -> None:
    assert resolve_model(str(checkpoint)) == checkpoint
    assert resolve_model(str(checkpoint / "config.json")) == checkpoint


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../x/y", "/no/such"])
def test_nothing_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match="no such file or directory"):
        resolve_model(name)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(InvalidInputError, match="expected a directory"):
        resolve_model(str(tmp_path / "a.txt"))


def test_hub_id_that_is_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(DownloadError, match=r"not in the local Hugging Face cache.*bundle pull org/name"):
        resolve_model("org/name", may_fetch=False)


def test_hub_id_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert resolve_model("org/name", may_fetch=False) == snapshot
    (snapshot / "model.safetensors").write_bytes(b"x")
    assert resolve_model("org/name") == snapshot
    made: list[Path] = []
    assert ensure_bundle(snapshot, fake_quantise(made)).name.startswith("models--org--name-")


def test_a_checkpoint_is_quantised_once(checkpoint: Path) -> None:
    made: list[Path] = []
    first = ensure_bundle(checkpoint, fake_quantise(made))
    assert first.parent == cache_dir() / "bundles"
    assert first.name.startswith("My-Model-")
    assert ensure_bundle(checkpoint, fake_quantise(made)) == first
    assert made == [first]


def test_gguf_files_are_checkpoints(tmp_path: Path, checkpoint: Path) -> None:
    names = [f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for name in (*names, "other.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    first = tmp_path / names[0]
    assert resolve_model(str(first)) == first
    made: list[Path] = []
    bundle = ensure_bundle(first, fake_quantise(made))
    assert bundle.name.startswith("m-00001-of-00002-")
    (tmp_path / "other.gguf").write_bytes(b"changed")
    assert ensure_bundle(first, fake_quantise(made)) == bundle
    (tmp_path / names[1]).write_bytes(b"changed")
    assert ensure_bundle(first, fake_quantise(made)) != bundle
    pair = ensure_bundle(checkpoint, fake_quantise(made), first)
    assert pair != ensure_bundle(checkpoint, fake_quantise(made))
    assert len(made) == 4


def test_changed_content_is_another_bundle(checkpoint: Path) -> None:
    before = fingerprint(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"y" * 100)
    assert fingerprint(checkpoint) != before


def test_large_files_are_known_by_edges_size_and_time(checkpoint: Path) -> None:
    large = checkpoint / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(40 << 20)
    os.utime(large, (1, 1))
    before = fingerprint(checkpoint)
    os.utime(large, (2, 2))
    assert fingerprint(checkpoint) != before


def test_a_bundle_is_itself(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text(json.dumps({}))
    assert ensure_bundle(tmp_path, fake_quantise([])) == tmp_path


def test_a_directory_that_is_neither(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="neither a bundle"):
        ensure_bundle(tmp_path, fake_quantise([]))


def test_relative_xdg_directories_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "kttools"
    assert config_dir() == Path.home() / ".config" / "kttools"
