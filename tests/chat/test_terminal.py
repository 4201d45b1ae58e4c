"""The interactive loop without a terminal: lines in, what is said out."""

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kttools.chat import slash
from kttools.chat.prompt_text import one_shot_prompt, read_text_file
from kttools.chat.session import ChatOptions
from kttools.chat.stats import Stats
from kttools.chat.terminal import Interrupt, Printer, Terminal, read_message
from kttools_runtime.errors import InvalidInputError, UsageError
from kttools_runtime.streaming import Segment


class Echo:
    """A session that answers with the question."""

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.system: str | None = None
        self.options = ChatOptions()
        self.stats: Stats | None = None
        self.cache = SimpleNamespace(length=3, capacity=100)
        self.asked: list[str] = []

    def ask(self, text: str, should_stop=None) -> Iterator[Segment]:
        if text == "fail":
            raise InvalidInputError("cannot")
        self.asked.append(text)
        self.stats = Stats(prompt_tokens=1)
        self.stats.finish("interrupted" if text == "^C" else "stop")
        if text == "^C":
            signal.raise_signal(signal.SIGINT)
            assert should_stop()
        yield Segment(f"echo {text}", False)
        if text == "^C^C":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]

    def regenerate(self, should_stop=None) -> Iterator[Segment]:
        yield from self.ask("again", should_stop)

    def clear(self) -> None:
        self.messages.clear()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def reader(lines: list[str | BaseException]):
    """input() over given lines; exceptions are raised."""
    queue = iter(lines)

    def read(prompt: str) -> str:
        line = next(queue, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def talk(*lines: str | BaseException, session: Echo | None = None) -> tuple[Echo, str]:
    """The session after these lines, and everything said to the user."""
    session, said = session or Echo(), []
    Terminal(session, slash.run, said.append, 0.1, reader(list(lines))).run()  # type: ignore[arg-type]
    return session, "\n".join(said)


def test_questions_and_speeds(capsys: pytest.CaptureFixture[str]) -> None:
    session, said = talk("one", "", "two", "/exit", "three")
    assert session.asked == ["one", "two"]
    assert capsys.readouterr().out == "echo one\necho two\n"
    assert said.count("tok/s; generation") == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["plain"], "plain"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""first', "", 'last"""'], "first\n\nlast"),
        (['"""', "a", "b", '"""'], "a\nb"),
        (['"""one"""'], "one"),
    ],
)
def test_messages_of_several_lines(lines: list[str | BaseException], message: str) -> None:
    assert read_message(reader(lines)) == message


def test_help_lists_every_command() -> None:
    _, said = talk("/help")
    assert all(name in said for name in slash.COMMANDS)


def test_errors_keep_the_session() -> None:
    session, said = talk(
        "fail", "/bogus", "/set bogus 1", "/set temp x", "/set temp -1", "/read", "/save", "ok"
    )
    assert "error: cannot" in said
    assert "unknown command /bogus" in said
    assert "unknown setting 'bogus'; valid: temp, top_k" in said
    assert "/set temp needs a number, got 'x'" in said
    assert "temperature must be in [0, 100], got -1.0" in said
    assert "/read needs a file name" in said
    assert session.asked == ["ok"]


def test_set_changes_the_options() -> None:
    session, said = talk("/set temp 0.5", "/set top-k=7", "/set n 12", "/set seed 3")
    assert (session.options.sampling.temperature, session.options.sampling.top_k) == (0.5, 7)
    assert (session.options.max_new_tokens, session.options.sampling.seed) == (12, 3)
    assert "temp = 0.5" in said
    session, _ = talk("/set n -1", "/set seed none", session=session)
    assert (session.options.max_new_tokens, session.options.sampling.seed) == (None, None)


def test_system_clear_regen_stats() -> None:
    session, said = talk("/system", "hello", "/system Be kind.", "/system", "/regen", "/stats", "/clear")
    assert session.system == "Be kind."
    assert session.asked == ["hello", "again"]
    assert session.messages == []
    assert "(no system message)" in said
    assert "system: Be kind." in said
    assert "cache: 3 of 100 tokens" in said
    session, _ = talk("/system none", session=session)
    assert session.system is None


def test_read_goes_before_the_next_message(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("file text\n")
    session, said = talk(f"/read {tmp_path / 'a.txt'}", "question", "next")
    assert session.asked == ["file text\n\nquestion", "next"]
    assert "9 characters" in said


def test_save_writes_once(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    _, said = talk("hi", f"/save {path}", f"/save {path}", f"/save {tmp_path / 'no' / 'x'}")
    assert json.loads(path.read_text())["messages"][0] == {"role": "user", "content": "hi"}
    assert "exists already" in said
    assert "cannot be written" in said
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def test_ctrl_c_stops_the_answer_and_keeps_the_session() -> None:
    session, said = talk("^C", "next")
    assert session.asked == ["^C", "next"]
    assert "stopped" in said


def test_ctrl_c_twice_leaves() -> None:
    with pytest.raises(KeyboardInterrupt):
        talk("^C^C", "next")
    with pytest.raises(KeyboardInterrupt):
        talk("^C", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        talk(KeyboardInterrupt(), KeyboardInterrupt())


def test_ctrl_c_at_the_prompt_only_warns() -> None:
    session, said = talk(KeyboardInterrupt(), "hello", KeyboardInterrupt(), "bye")
    assert session.asked == ["hello", "bye"]
    assert said.count("Ctrl-C again") == 2


def test_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt().caught():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


SEGMENTS = [Segment("<think>a\x1b[31m</think>", True), Segment("b", False)]


def test_a_terminal_gets_dim_thinking_and_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = FakeTerminal()
    Printer(stream).answer(SEGMENTS)
    assert stream.getvalue() == "\x1b[2m<think>a\ufffd[31m</think>\x1b[0mb\n"
    monkeypatch.setenv("NO_COLOR", "1")
    plain = FakeTerminal()
    Printer(plain).answer(SEGMENTS)
    assert "\x1b" not in plain.getvalue()


def test_a_pipe_gets_the_text_as_it_is() -> None:
    stream = io.StringIO()
    assert Printer(stream).answer(SEGMENTS) == stream.getvalue().removesuffix("\n")
    assert stream.getvalue() == "<think>a\x1b[31m</think>b\n"


def test_prompt_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("caf\u00e9\n\n".encode())
    assert read_text_file(path) == "caf\u00e9\n"
    assert one_shot_prompt(None, str(path)) == "caf\u00e9\n"
    assert one_shot_prompt("text", None) == "text"
    for data, message in ((b" \n", "the prompt is empty"), (b"a\xff", "not UTF-8 at byte 1")):
        path.write_bytes(data)
        with pytest.raises(InvalidInputError, match=message):
            one_shot_prompt(None, str(path))
    with pytest.raises(InvalidInputError, match=r"no\.txt: cannot be read: No such file"):
        one_shot_prompt(None, str(tmp_path / "no.txt"))
    with pytest.raises(InvalidInputError, match="the prompt is empty"):
        one_shot_prompt("", None)


def test_unknown_commands_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="unknown command /x"):
        slash.run(SimpleNamespace(), "/x y")  # type: ignore[arg-type]
