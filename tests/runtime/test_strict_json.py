"""The JSON parser of every file that comes with a model."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttools_runtime import strict_json
from kttools_runtime.errors import CorruptFileError, InvalidInputError

REFUSED = {
    b'{"a":1,"a":1}': "duplicate key 'a'",
    b'{"x":{"a":1,"a":1}}': "duplicate key 'a'",
    b"[NaN]": "number NaN",
    b"[-Infinity]": "number -Infinity",
    b"[1e999]": "does not fit",
    b"\xff": "not UTF-8 at byte 0",
    b"\xef\xbb\xbf{}": "not valid JSON",
    b"": "not valid JSON",
    b"{} {}": "not valid JSON",
    b"[" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize(("data", "message"), REFUSED.items(), ids=lambda value: str(value)[:30])
def test_refuses(data: bytes, message: str) -> None:
    with pytest.raises(CorruptFileError, match=f"^here: .*{message}"):
        strict_json.parse(data, "here")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)


@given(JSON)
def test_canonical_form_is_a_fixed_point(value: object) -> None:
    data = strict_json.canonical(value)
    assert data.isascii()
    assert strict_json.parse(data, "x") == value
    assert strict_json.canonical(strict_json.parse(data, "x")) == data


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(InvalidInputError, match="no such file"):
        strict_json.read_object(file)
    with pytest.raises(InvalidInputError, match="not a regular file"):
        strict_json.read_object(tmp_path)
    file.write_text("[]")
    with pytest.raises(CorruptFileError, match="expected a JSON object, got list"):
        strict_json.read_object(file)
    with pytest.raises(CorruptFileError, match="larger than the 1 bytes"):
        strict_json.read_object(file, max_bytes=1)
    with pytest.raises(CorruptFileError, match="bytes of JSON, expected at most"):
        strict_json.parse(b" " * (strict_json.MAX_JSON_BYTES + 1), "x")
