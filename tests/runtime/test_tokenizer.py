"""The tokenizer and chat template against transformers', and files that are broken or hostile."""

import json
import shutil
from pathlib import Path

import pytest

from kttools_runtime.errors import InvalidInputError
from kttools_runtime.tokenizer import Tokenizer, read_json_object

CONVERSATIONS = [
    [{"role": "user", "content": "What is AMX?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello \u4f60\u597d \U0001f600"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "  indented\n\n<|Assistant|> not a turn"},
    ],
]
AWKWARD = [
    "",
    " ",
    "\n\n",
    "a",
    "caf\u00e9 na\u00efve",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\x00\x7f",
    "12345 67",
]


@pytest.fixture(scope="module")
def tokenizer(nano_checkpoint: Path) -> Tokenizer:
    return Tokenizer(nano_checkpoint)


@pytest.fixture(scope="module")
def oracle(nano_checkpoint: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(nano_checkpoint)


@pytest.fixture
def copied(nano_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tokenizer's files, to be damaged."""
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        shutil.copy(nano_checkpoint / name, tmp_path / name)
    return tmp_path


def change_config(directory: Path, **values: object) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def sample_texts(samples_dir: Path) -> list[tuple[str, str]]:
    files = sorted(p for p in (samples_dir / "text").rglob("*") if p.suffix in (".txt", ".jsonl"))
    assert files
    return [(path.stem, path.read_text(encoding="utf-8")[:60_000]) for path in files]


def test_ids_equal_transformers_on_every_domain(tokenizer: Tokenizer, oracle, samples_dir: Path) -> None:
    for name, text in [*sample_texts(samples_dir), *((repr(t), t) for t in AWKWARD)]:
        assert tokenizer.encode(text) == oracle(text)["input_ids"], name
        bare = oracle(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == bare, name


def test_text_survives_and_streams(tokenizer: Tokenizer, samples_dir: Path) -> None:
    for name, text in [*sample_texts(samples_dir), *((repr(t), t) for t in AWKWARD)]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text, name
        assert "".join(tokenizer.stream_decoder(skip_special_tokens=False).stream(iter(ids))) == text, name


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "many"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_template_equals_transformers(tokenizer, oracle, messages, add_generation_prompt) -> None:
    expected = oracle.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert tokenizer.render_chat(messages, add_generation_prompt) == expected
    ids = oracle.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert tokenizer.apply_chat_template(messages, add_generation_prompt) == list(ids)


def test_template_output_has_one_bos(tokenizer: Tokenizer) -> None:
    ids = tokenizer.apply_chat_template(CONVERSATIONS[0])
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(("flag", "starts_with_bos"), [(True, True), (False, False), (None, True)])
def test_add_bos_token_decides_over_the_post_processor(copied: Path, flag, starts_with_bos) -> None:
    change_config(copied, add_bos_token=flag)
    tokenizer = Tokenizer(copied)
    assert (tokenizer.encode("a")[0] == tokenizer.bos_token_id) is starts_with_bos


def test_add_bos_token_without_a_post_processor(copied: Path) -> None:
    path = copied / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    tokenizer = Tokenizer(copied)
    assert tokenizer.encode("a") == [tokenizer.bos_token_id, *tokenizer.encode("a", add_special_tokens=False)]


def test_template_file_comes_before_the_config(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text("file:{{ messages[0].content }}")
    assert Tokenizer(copied).render_chat(CONVERSATIONS[0]) == "file:What is AMX?"


def test_template_list_has_a_default(copied: Path) -> None:
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "plain"}]
    change_config(copied, chat_template=named)
    assert Tokenizer(copied).render_chat(CONVERSATIONS[0]) == "plain"
    change_config(copied, chat_template=named[:1])
    with pytest.raises(InvalidInputError, match=r"no template named default, only \['tool_use'\]"):
        _ = Tokenizer(copied).chat_template


def test_without_a_template_the_message_says_raw(copied: Path) -> None:
    change_config(copied, chat_template=None)
    with pytest.raises(InvalidInputError, match="no chat template; use --raw"):
        Tokenizer(copied).render_chat(CONVERSATIONS[0])


def test_special_tokens_may_be_objects(copied: Path) -> None:
    change_config(copied, bos_token={"content": "<|User|>", "lstrip": False})
    assert Tokenizer(copied).bos_token_id == 3
    change_config(copied, bos_token=7)
    with pytest.raises(InvalidInputError, match="bos_token: expected a string or null, got int"):
        Tokenizer(copied)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "not valid JSON"),
        ("tokenizer.json", b'{"model": 1, "model": 2}', "duplicate key 'model'"),
        ("tokenizer.json", b"{}", "not a tokenizer this version can run"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8 at byte 0"),
        ("tokenizer_config.json", b"[]", "expected a JSON object, got list"),
        ("tokenizer_config.json", b"[" * 100_000, "not valid JSON"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template is int"),
        ("generation_config.json", b"nope", "not valid JSON"),
        ("chat_template.jinja", b"{% for %}", "does not compile: line 1"),
        ("chat_template.jinja", b"x" * (1 << 20) + b"x", "the limit is 1048576"),
    ],
)
def test_damaged_files(copied: Path, name: str, content: bytes, message: str) -> None:
    (copied / name).write_bytes(content)
    with pytest.raises(InvalidInputError, match=message):
        Tokenizer(copied).render_chat(CONVERSATIONS[0])


def test_file_larger_than_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}" + " " * 100)
    with pytest.raises(InvalidInputError, match="larger than 64 bytes"):
        read_json_object(tmp_path / "a.json", max_bytes=64)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"tokenizer\.json: no such file"):
        Tokenizer(tmp_path)


def test_text_that_is_not_unicode(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidInputError, match="not valid Unicode at character 2"):
        tokenizer.encode("ab\udcff")


def test_ids_out_of_range(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidInputError, match="token id -1 is out of range"):
        tokenizer.decode([5, -1])
