"""Licence and model card come along; the manifest says what they say; the fingerprint is the model's own."""

import shutil
from pathlib import Path

import pytest

import kttools_runtime as kt
from kttools.bundle.inspect import inspect_path
from kttools.bundle.manifest import manifest_parts, write_manifest
from kttools.bundle.model_card import find_model_card, front_matter
from kttools.bundle.render import render
from kttools.bundle.verify import verify_bundle
from kttools.profiling.install import install_table
from kttools_runtime import strict_json
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.manifest import OPTIONAL_KEYS, License, load_manifest
from tests.conftest import quantize
from tests.runtime.test_manifest import signed

CARD = """---
language:
- en
license: other
license_name: "deepseek"
license_link: LICENSE
tags: [a, b]
---
# A model
license: not this one
"""


@pytest.fixture(scope="module")
def carded(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    source = Path(shutil.copytree(nano_checkpoint, root / "hf"))
    (source / "README.md").write_text(CARD)
    (source / "LICENSE").write_bytes(b"do\r\nas you like\n")
    (source / "License (code).txt").write_text("and the code, too")
    return quantize(source, root / "bundle", "--workers", "2")


def test_card_and_licence_are_in_the_bundle(carded: Path) -> None:
    manifest = load_manifest(carded)
    texts = ("model-card/LICENSE", "model-card/License--code-.txt")
    assert manifest.license == License("other", "deepseek", "LICENSE", texts)
    assert (carded / texts[0]).read_bytes() == b"do\r\nas you like\n"
    assert manifest.model_card == "model-card/README.md"
    assert (carded / manifest.model_card).read_text() == CARD
    assert verify_bundle(carded).problems == []


def test_inspect_shows_it(carded: Path) -> None:
    report = inspect_path(carded)
    assert report["license"]["id"] == "other"
    assert (report["requires"], report["is_signed"], report["unknown_keys"]) == ([], False, [])
    text = render(report)
    for line in ("other, deepseek, LICENSE (model-card/LICENSE,", report["fingerprint"], "signature"):
        assert line in text


def test_fingerprint_is_the_model_s(carded: Path, nano_bundle: Path) -> None:
    fingerprint = kt.load(nano_bundle).fingerprint()
    assert load_manifest(nano_bundle).fingerprint == fingerprint
    assert load_manifest(carded).fingerprint == fingerprint


def test_a_bundle_from_before_these_keys_loads(nano_bundle: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(nano_bundle, tmp_path / "old"))
    document = strict_json.read_object(old / "bundle.json")
    for key in (*OPTIONAL_KEYS, "manifest_sha256"):
        del document[key]
    (old / "bundle.json").write_bytes(signed(document))
    assert load_manifest(old).fingerprint is None
    assert verify_bundle(old).problems == []
    assert kt.load(old).fingerprint() == kt.load(nano_bundle).fingerprint()


def test_writing_a_manifest_again_loses_nothing(nano_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(nano_bundle, tmp_path / "copy"))
    before = (copy / "bundle.json").read_bytes()
    write_manifest(copy, **manifest_parts(load_manifest(copy)))
    assert (copy / "bundle.json").read_bytes() == before
    document = strict_json.read_object(copy / "bundle.json") | {"of_the_future": {"a": [1, None]}}
    del document["manifest_sha256"]
    (copy / "bundle.json").write_bytes(signed(document))
    (copy / "bundle.json.sig").write_text("of the old manifest")
    manifest = write_manifest(copy, **manifest_parts(load_manifest(copy)))
    assert manifest.other == {"of_the_future": {"a": [1, None]}}
    assert not (copy / "bundle.json.sig").exists()


def test_an_installed_table_is_listed_by_name(nano_bundle: Path, tmp_path: Path, repo: Path) -> None:
    copy = Path(shutil.copytree(nano_bundle, tmp_path / "copy"))
    table = repo / "profiles/ds3-nano-6-static.expert-table.json"
    manifest = install_table(copy, table, load_manifest(copy).fingerprint or "")
    assert manifest.expert_tables == {"expert-table.json": "ds3-nano-6-static"}
    assert verify_bundle(copy).problems == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("\ufeff---\r\nlicense:  'mit' \r\n---\r\n", {"license": "mit"}),
        ("---\nlicense:\n  - mit\n  - apache-2.0\ntags:\n- x\n---\n", {"license": "mit, apache-2.0"}),
        ("---\nlicense: mit\n", {"license": "mit"}),
        ("license: mit\n", {}),
        ("---\nlicense:\n---\n", {}),
        ("---\nlicense: \x1b[31mred\n---\n", {}),
        ("---\nlicense: " + "x" * 300 + "\n---\n", {}),
        ("", {}),
    ],
)
def test_front_matter(text: str, expected: dict[str, str]) -> None:
    assert front_matter(text.encode(), "x") == expected


def test_odd_cards(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    with pytest.raises(InvalidInputError, match=r"README\.md: not UTF-8 at byte 13"):
        find_model_card(tmp_path)
    (tmp_path / "README.md").unlink()
    for name in ("LICENSE", "license", "LICENSE.d", "LICENSE\u00e9", "unlicensed"):
        (tmp_path / name).touch()
    assert list(find_model_card(tmp_path).files) == ["model-card/LICENSE", "model-card/LICENSE.d"] + [
        f"model-card/{name}" for name in ("license-2",)
    ]
    assert find_model_card(tmp_path / "nowhere").files == {}
    assert find_model_card(None).license == License()
