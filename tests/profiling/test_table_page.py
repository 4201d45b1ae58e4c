"""docs/expert-table.md names the keys and kinds that the reader knows, and its example runs."""

import re
from pathlib import Path

import pytest

import kttools_runtime as kt
from kttools_runtime import expert_table
from kttools_runtime.expert_policy import KINDS, ORDERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "expert-table.md"


def section(heading: str) -> str:
    """The text under a heading up to the next one."""
    text = PAGE.read_text(encoding="utf-8")
    return re.split(r"^#+ ", text.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def first_column(heading: str) -> set[str]:
    cells = re.findall(r"^\| (`.*?) \|", section(heading), re.M)
    return {word for cell in cells for word in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize(
    ("heading", "keys"),
    [
        ("The file", expert_table.KEYS),
        ("policy", expert_table.POLICY_KEYS),
        ("policy.layers", expert_table.LAYER_KEYS),
        ("What a kind keeps", set(KINDS)),
    ],
)
def test_the_page_lists_what_the_reader_knows(heading: str, keys: set[str]) -> None:
    assert first_column(heading) == set(keys)


def test_the_page_lists_the_orders() -> None:
    assert all(f"`{order}`" in section("policy") for order in ORDERS)


def test_the_example_runs(nano_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    (tmp_path / "build" / "demo").mkdir(parents=True)
    (tmp_path / "build" / "demo" / nano_bundle.name).symlink_to(nano_bundle)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    model = names["model"]
    assert isinstance(model, kt.Model)
    ids = model.tokenizer.encode("The quick brown fox")
    with_table = model.logits(ids)
    model.use_table(None)
    assert not bool((with_table == model.logits(ids)).all())
