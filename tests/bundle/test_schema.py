"""bundle.schema.json and the reader agree, on real manifests and on hostile ones."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kttools_runtime import strict_json
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.manifest import FEATURES, KEYS, LINEAR_FORMATS, OPTIONAL_KEYS, parse_manifest
from tests.conftest import REPO
from tests.runtime.test_manifest import ATTACKS, EXTRA, document, signed

SCHEMA = json.loads((REPO / "kttools/bundle/schemas/bundle.schema.json").read_text())
# References between parts, and what depends on the model: beyond a schema.
ONLY_THE_READER = {
    "model broken",
    "layer missing",
    "expert of no file",
    "formats of too few experts",
    "formats all the same",
    "twice",
    "other case",
    "folder in other case",
    "a file and a folder",
    "license of no file",
    "table of no file",
    "one pack of two layers",
}
MUTATIONS = 2000
JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**64,
    1.5,
    "",
    "x",
    "../x",
    "a\0",
    "\x1b[2J",
    [],
    {},
    ["x"],
    {"x": 1},
)


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


def complete() -> dict[str, Any]:
    return parsed(signed(document(**EXTRA)))


def parsed(data: bytes) -> dict[str, Any]:
    value = strict_json.parse(data, "x")
    assert isinstance(value, dict)
    return value


def is_read(content: dict[str, Any]) -> bool:
    """By the program, with a right checksum put under whatever it says."""
    content = {key: value for key, value in content.items() if key != "manifest_sha256"}
    try:
        parse_manifest(signed(content), Path("b"))
    except InvalidInputError:
        return False
    return True


def test_real_manifests(
    validator: jsonschema.Draft202012Validator, sound_bundle: Path, nano_bundle: Path, nano_bundle_bf16: Path
) -> None:
    for bundle in (sound_bundle, nano_bundle, nano_bundle_bf16):
        validator.validate(json.loads((bundle / "bundle.json").read_text()))
    validator.validate(complete())
    validator.validate(parsed(signed(document())))


def test_the_same_words() -> None:
    assert set(SCHEMA["properties"]) == KEYS | OPTIONAL_KEYS
    assert set(SCHEMA["required"]) == KEYS
    assert set(SCHEMA["properties"]["requires"]["items"]["enum"]) == FEATURES
    assert SCHEMA["properties"]["linears"]["additionalProperties"]["enum"] == list(LINEAR_FORMATS)


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_manifests(validator: jsonschema.Draft202012Validator, name: str) -> None:
    content = complete()
    ATTACKS[name][0](content)
    assert not is_read(content)
    assert validator.is_valid(content) == (name in ONLY_THE_READER)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every position in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def mutated(rng: random.Random, content: dict[str, Any], where: list[tuple[Any, ...]]) -> dict[str, Any]:
    content = copy.deepcopy(content)
    *path, last = rng.choice(where)
    parent: Any = content
    for key in path:
        parent = parent[key]
    if rng.random() < 0.3:
        del parent[last]
    else:
        parent[last] = rng.choice(JUNK)
    return content


def test_what_the_schema_refuses_the_reader_refuses(validator: jsonschema.Draft202012Validator) -> None:
    rng = random.Random(0)
    sound = complete()
    del sound["manifest_sha256"]
    where = [path for path in places(sound) if path]
    refused = 0
    for _ in range(MUTATIONS):
        content = mutated(rng, sound, where)
        if not validator.is_valid(content | {"manifest_sha256": "0" * 64}):
            refused += 1
            assert not is_read(content), content
    assert refused > MUTATIONS // 4
