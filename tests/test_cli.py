"""The command line itself: speed of --help, spellings, where values come from, errors and exit codes."""

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kttools import cli, config_file, options
from kttools_runtime import errors
from kttools_runtime.version import __version__

SEEN: dict[str, object] = {}
FAILURE: list[BaseException] = []


@click.command()
@options.model_argument
@options.cpu_infer_option
@click.option("-c", "--ctx-size", "--cache_lens", "cache_lens", type=int)
@click.option("--top-k", type=int, default=1)
@click.option("--force_think", is_flag=True)
@click.option("--data", multiple=True)
@click.option("-sys", "--system")
@click.option("-s", "--seed", type=int)
@click.pass_context
def probe(ctx: click.Context, **given: object) -> None:
    """Records what it was given, or fails as told."""
    SEEN.clear()
    SEEN.update(given, quiet=options.settings().quiet, debug=options.settings().debug)
    if FAILURE:
        raise FAILURE.pop()


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A probe command, an empty working directory and an empty user configuration."""
    entry = cli.Entry(f"{__name__}:probe", "Probe.")
    monkeypatch.setitem(cli.COMMANDS, "probe", entry)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    FAILURE.clear()
    SEEN.clear()
    yield
    FAILURE.clear()


def run(*args: str) -> int:
    return cli.main(["probe", *args])


def user_config(text: str) -> None:
    path = Path(os.environ["XDG_CONFIG_HOME"]) / "kttools" / config_file.NAME
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = "import sys, kttools.cli as c; c.main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    best = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "quantize" in done.stdout
    for heavy in ("'torch'", "'numpy'", "'tokenizers'", "'kttools.commands"):
        assert heavy not in done.stderr
    assert best < 0.3  # CPU time, so that a busy machine does not decide; measured 0.07 s


def test_every_command_loads_and_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.COMMANDS:
        if name != "probe":
            assert cli.main([name, "--help"]) == 0, name
            assert re.search(r"Examples?:", capsys.readouterr().out), name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kttools {__version__}\n"


def test_module_runs_too() -> None:
    done = subprocess.run([sys.executable, "-m", "kttools", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"kttools {__version__}\n")


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--cpu_infer", "3"], "cpu_infer", 3),
        (["--cpu-infer", "3"], "cpu_infer", 3),
        (["--cpu-infer=3"], "cpu_infer", 3),
        (["--threads", "3"], "cpu_infer", 3),
        (["-t", "3"], "cpu_infer", 3),
        (["--cache_lens", "9"], "cache_lens", 9),
        (["--cache-lens", "9"], "cache_lens", 9),
        (["--ctx_size", "9"], "cache_lens", 9),
        (["-c9"], "cache_lens", 9),
        (["--top_k", "5"], "top_k", 5),
        (["--top-k", "5"], "top_k", 5),
        (["--force-think"], "force_think", True),
        (["-sys", "Be brief"], "system", "Be brief"),
        (["-s", "4"], "seed", 4),
        (["--model-path", "m"], "model_option", "m"),
        (["-m", "m"], "model_option", "m"),
        (["m"], "model_argument", "m"),
        (["--quiet"], "quiet", True),
        (["--debug"], "debug", True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_spellings(args: list[str], name: str, value: object) -> None:
    assert run(*args) == 0
    assert SEEN[name] == value


def picked(*args: str, takes_weights: bool = True) -> tuple[str, str | None]:
    """(model, weights) a command gets from these arguments."""
    found: list[tuple[str, str | None]] = []

    @click.command()
    @options.model_argument
    @click.pass_context
    def command(ctx: click.Context, model_argument: str | None, model_option: str | None) -> None:
        model = options.pick_model(model_argument, model_option, ctx, takes_weights)
        found.append((model, options.weights_path(ctx, model)))

    command.main(list(args), standalone_mode=False)
    return found[0]


def test_gguf_path_is_the_model_or_its_weights() -> None:
    assert picked("--gguf_path", "g") == ("g", None)
    assert picked("m", "--gguf_path", "g") == ("m", "g")
    assert picked("--model_path", "m", "--gguf_path", "g") == ("m", "g")
    assert picked("--gguf_path", "g", takes_weights=False) == ("g", None)
    with pytest.raises(click.UsageError, match="is for quantize and chat"):
        picked("m", "--gguf_path", "g", takes_weights=False)


def test_global_options_before_the_command() -> None:
    assert cli.main(["--quiet", "--debug", "probe"]) == 0
    assert SEEN["quiet"]
    assert SEEN["debug"]


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("KTTOOLS_CPU_INFER", "5", "cpu_infer", 5),
        ("KTTOOLS_THREADS", "5", "cpu_infer", 5),
        ("KTTOOLS_CACHE_LENS", "7", "cache_lens", 7),
        ("KTTOOLS_CTX_SIZE", "7", "cache_lens", 7),
        ("KTTOOLS_FORCE_THINK", "1", "force_think", True),
        ("KTTOOLS_FORCE_THINK", "0", "force_think", False),
        ("KTTOOLS_MODEL", "m", "model_option", "m"),
        ("KTTOOLS_DATA", "a b", "data", ("a", "b")),
        ("KTTOOLS_QUIET", "1", "quiet", True),
        ("KTTOOLS_TOP_K", "", "top_k", 1),
    ],
)
def test_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, name: str, value: object
) -> None:
    monkeypatch.setenv(variable, text)
    assert run() == 0
    assert SEEN[name] == value


def test_a_bad_value_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KTTOOLS_CPU_INFER", "many")
    assert run() == 2
    assert "'many' is not a valid integer" in capsys.readouterr().err


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    """flag > environment > ./kttools.toml > the user's > default; in a file the command's table wins."""
    assert run() == 0
    assert SEEN["top_k"] == 1
    user_config("top_k = 2\n[probe]\ncache-lens = 20\n")
    assert run() == 0
    assert (SEEN["top_k"], SEEN["cache_lens"]) == (2, 20)
    Path(config_file.NAME).write_text(
        "top-k = 3\nother_commands_option = 1\n[probe]\ntop_k = 4\n[chat]\nx = 1\n"
    )
    assert run() == 0
    assert (SEEN["top_k"], SEEN["cache_lens"]) == (4, 20)
    monkeypatch.setenv("KTTOOLS_TOP_K", "5")
    assert run() == 0
    assert SEEN["top_k"] == 5
    assert run("--top-k", "6") == 0
    assert SEEN["top_k"] == 6


def test_config_values_of_all_kinds() -> None:
    Path(config_file.NAME).write_text('force_think = true\ndata = ["a", "b c"]\nsystem = "x"\nquiet = true\n')
    assert run() == 0
    assert (SEEN["force_think"], SEEN["data"], SEEN["system"]) == (True, ("a", "b c"), "x")
    assert SEEN["quiet"]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("top_k = ", 3, "kttools.toml: not valid TOML"),
        ("[probe]\nbogus = 1", 3, "unknown option 'bogus'; known: "),
        ("[probe.top_k]\na = 1", 3, "top_k must be a string, number, boolean or a list"),
        ('top_k = "x"', 2, "'x' is not a valid integer"),
        ("a = " + "[" * 100_000, 3, "not valid TOML"),
        ("#" * ((1 << 20) + 1), 3, "the limit is 1048576"),
    ],
)
def test_broken_config(text: str, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config_file.NAME).write_text(text)
    assert run() == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.KTError("plain"), 1, "plain"),
        (errors.UsageError("two\nlines"), 2, "two; lines"),
        (errors.CorruptFileError("cut short"), 3, "cut short"),
        (errors.ResourceError("no RAM"), 4, "no RAM"),
        (errors.HardwareError("no AMX"), 5, "no AMX"),
        (errors.QualityGateError("too far"), 6, "too far"),
        (errors.DownloadError("offline"), 7, "offline"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 4, "f: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file", "f"), 3, "f: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 1, "f: Permission denied"),
        (MemoryError(), 4, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 4, "not enough memory"),
        (ValueError("odd"), 1, "unexpected ValueError: odd (use --debug for the traceback)"),
        (click.UsageError("bad"), 2, "bad"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_are_one_line(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    FAILURE.append(error)
    assert run() == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"kttools: error: {message}")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("error", [ValueError("odd"), errors.InvalidInputError("bad file")])
def test_debug_shows_the_traceback(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    FAILURE.append(error)
    run("--debug")
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_interrupted(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    FAILURE.append(error)
    assert run() == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["probe", "--bogus"], "No such option"),
        (["probe", "--cpu_infer", "0"], "0 is not in the range x>=1"),
        (["chat"], "Missing argument 'MODEL'"),
        (["chat", "a", "-m", "b", "-p", "x"], "MODEL is given twice: a and b"),
    ],
)
def test_usage_errors(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m kttools doctor | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete"), ("zsh", "compdef"), ("fish", "complete")])
def test_completion_scripts(shell: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert word in script
    assert "_KTTOOLS_COMPLETE" in script


def test_completion_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def complete(words: str, word: str) -> set[str]:
        environment = {**os.environ, "_KTTOOLS_COMPLETE": "bash_complete", "COMP_WORDS": words}
        environment["COMP_CWORD"] = str(len(words.split()) - (1 if word else 0))
        done = subprocess.run(
            [sys.executable, "-m", "kttools"], env=environment, capture_output=True, text=True
        )
        return {line.partition(",")[2] for line in done.stdout.splitlines()}

    assert "quantize" in complete("kttools qu", "qu")
    assert "--cpu_infer" in complete("kttools chat --cpu", "--cpu")


def test_adopting_twice_changes_nothing() -> None:
    first = [p.name for p in options.adopt(probe).params]
    assert [p.name for p in options.adopt(probe).params] == first


def test_options_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A spelling, with - and _ the same, belongs to one option of a command."""
    group = cli.build_group()
    for name in cli.COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        spellings = [s for p in command.params for s in options.long_spellings(p)]
        assert len(spellings) == len(set(spellings)), name
