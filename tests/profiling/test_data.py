"""Data specs, documents, provenance, and one clear error for each kind of bad data."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kttools.profiling import data, data_rows
from kttools.profiling.data import documents, provenance
from kttools.profiling.data_spec import parse_spec, parse_specs
from kttools_runtime.errors import DownloadError, InvalidInputError, UsageError
from kttools_runtime.tokenizer import Tokenizer

TEXTS = ["The first document.", "The second one,\non two lines.", "\u7b2c\u4e09"]


@pytest.fixture(scope="module")
def tokenizer(nano_checkpoint: Path) -> Tokenizer:
    return Tokenizer(nano_checkpoint)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries read these at import, so the switch itself is replaced."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python=jsonl:a/b.jsonl#text", ("python", "jsonl", "a/b.jsonl", "text", None, None)),
        ("zh=parquet:d/*.parquet#content", ("zh", "parquet", "d/*.parquet", "content", None, None)),
        ("x=text:notes.txt", ("x", "text", "notes.txt", "text", None, None)),
        ("a=arrow:x.arrow#body", ("a", "arrow", "x.arrow", "body", None, None)),
        ("chat=jsonl:odd#name.jsonl#messages", ("chat", "jsonl", "odd#name.jsonl", "messages", None, None)),
        ("hf:org/name@config:split#field", ("name", "hf", "org/name", "field", "config", "split")),
        ("w=hf:org/name", ("w", "hf", "org/name", "text", None, "train")),
        ("hf:org/name:train[:5%]", ("name", "hf", "org/name", "text", None, "train[:5%]")),
        ("samples/python.test.jsonl", ("python", "jsonl", "samples/python.test.jsonl", "text", None, None)),
        ("parquet:corpus/*.parquet", ("corpus", "parquet", "corpus/*.parquet", "text", None, None)),
    ],
)
def test_specs_are_read(text: str, expected: tuple[Any, ...]) -> None:
    spec = parse_spec(text)
    assert (spec.domain, spec.kind, spec.location, spec.field, spec.config, spec.split) == expected
    assert spec.text == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("csv:a.csv", "unknown kind 'csv', expected one of jsonl, parquet, arrow, text, hf"),
        ("somewhere", "no kind"),
        ("x=jsonl:", "names no file"),
        ("hf:a/b/c", r"expected hf:org/name\[@config\]"),
        ("", "no kind"),
    ],
)
def test_wrong_specs_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_spec(text)


def test_domains_must_differ() -> None:
    assert [spec.domain for spec in parse_specs(["a=text:x", "b=text:x"])] == ["a", "b"]
    with pytest.raises(UsageError, match="same domain name 'a'"):
        parse_specs(["a=text:x", "jsonl:a.jsonl"])


@pytest.mark.parametrize(
    ("kind", "write"), [("jsonl", write_jsonl), ("parquet", write_parquet), ("arrow", write_arrow)]
)
def test_every_kind_gives_the_same_documents(
    kind: str, write: Callable[..., Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / f"part.{kind}", [{"body": text, "n": i} for i, text in enumerate(TEXTS)])
    found = list(documents(f"d={kind}:{path}#body", tokenizer))
    assert [document.token_ids for document in found] == [tokenizer.encode(text) for text in TEXTS]
    assert [document.id for document in found] == [f"part.{kind}:{i}" for i in range(3)]
    assert {document.domain for document in found} == {"d"}
    (entry,) = provenance(f"d={kind}:{path}#body")["files"]
    assert entry["rows"] == 3
    assert entry["bytes"] == path.stat().st_size


def test_a_text_file_is_one_document_and_globs_are_sorted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "b").mkdir()
    for name, text in (("b/1.txt", TEXTS[1]), ("a.txt", TEXTS[0])):
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = list(documents(f"t=text:{tmp_path}/**/*.txt", tokenizer))
    assert [document.id for document in found] == ["a.txt:0", "b/1.txt:0"]
    assert [document.token_ids for document in found] == [tokenizer.encode(text) for text in TEXTS[:2]]


def test_messages_go_through_the_chat_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    (found,) = documents(f"chat=jsonl:{path}#messages", tokenizer)
    assert found.token_ids == tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert found.token_ids[-1] == tokenizer.eos_token_id


def test_budget_cuts_the_last_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in TEXTS])
    whole = [tokenizer.encode(text) for text in TEXTS]
    budget = len(whole[0]) + 3
    cut = [document.token_ids for document in documents(f"jsonl:{path}", tokenizer, budget)]
    assert cut == [whole[0], whole[1][:3]]
    # One token left is not worth a document.
    assert len(list(documents(f"jsonl:{path}", tokenizer, len(whole[0]) + 1))) == 1


def test_provenance_names_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [{"text": "x"}])
    monkeypatch.chdir(tmp_path)
    found = provenance("a=jsonl:corpus/*.jsonl")
    assert found["spec"] == "a=jsonl:corpus/*.jsonl"
    assert str(tmp_path) not in json.dumps(found)
    assert found["files"][0]["name"] == "a.jsonl"
    assert len(found["files"][0]["sha256"]) == 64


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("missing field", b'{"body": "x"}\n', "row 0 has no field 'text', only body"),
    ("field missing later", b'{"text": "x y"}\n{"n": 1}\n', "row 1 has no field 'text'"),
    ("empty document", b'{"text": "x y"}\n{"text": "  "}\n', "row 1 is empty in field 'text'; remove it"),
    ("not UTF-8", b'{"text": "x"}\n{"text": "caf\xe9"}\n', "not UTF-8 in line 2 at byte 13"),
    ("not JSON", b'{"text": "x"}\nplain\n', "cannot be read"),
    ("no rows", b"", "the file is empty"),
    ("a number", b'{"text": 3}\n', "field 'text' is int, expected text or chat messages"),
    ("lone surrogate", b'{"text": "\\ud800"}\n', "(not valid Unicode|cannot be read)"),
    ("no role", b'{"text": [{"content": "x"}]}\n', "expected chat messages"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[bad[0] for bad in BAD_FILES])
def test_bad_data_gets_one_clear_line(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=message) as caught:
        list(documents(f"jsonl:{path}", tokenizer))
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text


def test_missing_files_and_directories(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidInputError, match="no such file"):
        list(documents(f"jsonl:{tmp_path}/none-*.jsonl", tokenizer))
    with pytest.raises(InvalidInputError, match="is a directory"):
        list(documents(f"d=jsonl:{tmp_path}", tokenizer))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_binary_files(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / f"bad.{kind}"
    path.write_bytes(b"PAR1 but no more than that")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        list(documents(f"{kind}:{path}", tokenizer))


def undecodable(kind: str, path: Path) -> Path:
    """A string column that is not UTF-8, as a careless writer leaves it."""
    offsets = pa.array([0, 3, 7], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ok ca\xff\xfe")])
    table = pa.table({"text": column})
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize(("kind", "write"), [("parquet", write_parquet), ("arrow", write_arrow)])
def test_bad_rows_of_binary_files(
    kind: str, write: Callable[..., Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / f"bad.{kind}"
    for rows, message in (
        ([{"body": "x y"}], "row 0 has no field 'text', only body"),
        ([{"text": "x y"}, {"text": " "}], "row 1 is empty in field 'text'; remove it"),
        ([{"text": "x y"}, {"text": None}], "row 1 has no field 'text'"),
        ([{"text": b"x y"}], "field 'text' is bytes, expected text"),
        ([{"text": 3.5}], "field 'text' is float, expected text"),
    ):
        write(path, rows)
        check_one_line(f"{kind}:{path}", str(path), message, tokenizer)
    undecodable(kind, path)
    check_one_line(f"{kind}:{path}", str(path), "cannot be read", tokenizer)
    empty = pa.table({"text": pa.array([], pa.string())})
    if kind == "parquet":
        pq.write_table(empty, path)
        check_one_line(f"{kind}:{path}", str(path), "no rows in it", tokenizer)


def check_one_line(spec: str, start: str, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        list(documents(spec, tokenizer))
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"caf\xe9 au lait", b""], ids=["not UTF-8", "empty"])
def test_bad_text_files(content: bytes, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    check_one_line(f"text:{path}", str(path), "not UTF-8 in line 1 at byte 3|is empty", tokenizer)


def test_compressed_text_is_checked_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good, bad = tmp_path / "good.jsonl.gz", tmp_path / "bad.jsonl.gz"
    good.write_bytes(gzip.compress(b'{"text": "x y"}\n'))
    assert len(list(documents(f"jsonl:{good}", tokenizer))) == 1
    bad.write_bytes(gzip.compress(b'{"text": "x y"}\n')[:-9])
    check_one_line(f"jsonl:{bad}", str(bad), "cannot be read", tokenizer)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub cache as `hf download --repo-type dataset org/name` leaves it. Returns the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "datasets--org--name"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    write_jsonl(snapshot / "train.jsonl", [{"text": text} for text in (TEXTS[0], "", TEXTS[1])])
    write_jsonl(snapshot / "test.jsonl", [{"text": TEXTS[2]}])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return commit


def test_a_hub_data_set_is_read_from_the_cache_when_offline(hub_cache: str, tokenizer: Tokenizer) -> None:
    found = list(documents("hf:org/name", tokenizer))
    # The empty row is skipped, and the ids of the others keep their row numbers.
    assert [document.id for document in found] == ["org/name:0", "org/name:2"]
    assert found[0].token_ids == tokenizer.encode(TEXTS[0])
    (test,) = documents("held=hf:org/name:test", tokenizer)
    assert test.token_ids == tokenizer.encode(TEXTS[2])
    origin = provenance("hf:org/name")
    assert (origin["dataset"], origin["split"], origin["revision"]) == ("org/name", "train", hub_cache)


def test_hub_errors_say_what_to_do(hub_cache: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(DownloadError, match="offline"):
        list(documents("hf:org/other", tokenizer))
    with pytest.raises(InvalidInputError, match=r"(?i)split"):
        list(documents("hf:org/name:nosuchsplit", tokenizer))


def test_online_the_current_commit_is_pinned_and_streamed(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(path: str, **options: Any) -> list[dict[str, str]]:
        asked.update(path=path, **options)
        return [{"text": TEXTS[0]}]

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data_rows, "_current_commit", lambda repo_id: "abc")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (found,) = documents("hf:org/name@en:validation", tokenizer)
    assert found.id == "org/name:0"
    assert asked == {
        "path": "org/name",
        "name": "en",
        "split": "validation",
        "streaming": True,
        "revision": "abc",
    }


def test_sample_text_is_readable(samples_dir: Path, tokenizer: Tokenizer) -> None:
    for name in ("python", "c", "prose", "zh", "chat"):
        assert next(documents(f"{name}=jsonl:{samples_dir}/text/{name}.jsonl", tokenizer)).token_ids
    (chat, *_) = documents(f"chat=jsonl:{samples_dir}/text/chat.jsonl#messages", tokenizer, 50)
    assert len(chat.token_ids) >= data.MIN_TOKENS


def test_importing_the_module_loads_no_library() -> None:
    code = "import sys, kttools.profiling.data; print('datasets' in sys.modules, 'torch' in sys.modules)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == ["False", "False"]
