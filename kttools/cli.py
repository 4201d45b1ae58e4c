"""The command line: a table of commands loaded on use, and errors turned into one line and an exit code."""

import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

import click
from click.shell_completion import CompletionItem

from kttools_runtime.errors import KTError
from kttools_runtime.version import __version__

from .options import Settings, adopt, config_values, global_options, normalise_token


@dataclass(frozen=True, slots=True)
class Entry:
    """A command: where its click object is, and its line in the overview (so that --help imports nothing)."""

    target: str
    help: str


COMMANDS: dict[str, Entry] = {
    "quantize": Entry("kttools.commands.quantize:command", "Turn a checkpoint into a bundle."),
    "profile-experts": Entry(
        "kttools.commands.profile_experts:command", "Find out what fewer experts per token cost."
    ),
    "plan": Entry("kttools.commands.plan:command", "Show what a model would take, and at most give."),
    "chat": Entry("kttools.commands.chat:command", "Talk to a model, or answer one prompt."),
    "inspect": Entry("kttools.commands.inspect:command", "Show what is in a bundle, checkpoint or pack."),
    "verify": Entry("kttools.commands.verify:command", "Check every byte of a bundle."),
    "sign": Entry("kttools.commands.sign:command", "Sign a bundle, so that others know who made it."),
    "bundle": Entry("kttools.commands.bundle:command", "Pack, unpack, cut, send and fetch bundles."),
    "bench": Entry("kttools.commands.bench:command", "Measure the expert engine or a whole model."),
    "doctor": Entry("kttools.commands.doctor:command", "Show what this machine can run, and what slows it."),
    "convert": Entry("kttools.commands.convert:command", "Write a checkpoint or a bundle as GGUF."),
    "diff": Entry("kttools.commands.diff:command", "Compare two models tensor by tensor."),
    "eval": Entry("kttools.commands.eval:command", "Measure perplexity, and the distance from a reference."),
    "completion": Entry("kttools.commands.completion:command", "Print the shell completion script."),
}

EXIT_RUNTIME, EXIT_USAGE, EXIT_INPUT, EXIT_RESOURCE, EXIT_INTERRUPTED = 1, 2, 3, 4, 130
EXIT_TERMINATED = 143
LOOK_AGAIN_S = 1.0
Handler = Callable[[int, FrameType | None], None]
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is used, and no sooner."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module_name, _, attribute = entry.target.partition(":")
        command = getattr(importlib.import_module(module_name), attribute)
        return adopt(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Also reads the config files, as defaults of the command about to run."""
        name, command, rest = super().resolve_command(ctx, [args[0].replace("_", "-"), *args[1:]])
        if command is not None and name is not None and not ctx.resilient_parsing:
            ctx.default_map = {name: config_values(command, name)}
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The overview, from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names from the table, and the root's own options."""
        found = [CompletionItem(n, help=e.help) for n, e in COMMANDS.items() if n.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]


EPILOG = (
    "Every option also reads KTTOOLS_<OPTION> and kttools.toml (here, then in the user's config directory);"
    " - and _ in option names are the same. Exit codes: 0 ok, 1 runtime error, 2 usage, 3 invalid input,"
    " 4 not enough RAM or disk, 5 hardware, 6 quality gate, 7 download, 130 interrupted,"
    " 143 terminated."
)


def build_group() -> click.Group:
    """The root command."""
    version = click.version_option(__version__, prog_name="kttools", message="%(prog)s %(version)s")
    group = LazyGroup(
        "kttools",
        help="Convert, profile and run very large mixture-of-experts models on one affordable machine.",
        epilog=EPILOG,
        params=list(global_options()),
        context_settings={"token_normalize_func": normalise_token, "help_option_names": ["-h", "--help"]},
    )
    version(group)
    return group


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; nothing escapes as a traceback unless --debug."""
    settings = Settings(debug=_env_flag("KTTOOLS_DEBUG"), quiet=_env_flag("KTTOOLS_QUIET"))
    try:
        with _signals_caught():
            result = build_group().main(
                args=None if args is None else list(args),
                prog_name="kttools",
                standalone_mode=False,
                obj=settings,
            )
            sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if settings.debug and not isinstance(error, (click.ClickException, click.Abort, BrokenPipeError)):
            traceback.print_exc()
        message, code = explain(error)
        if isinstance(error, BrokenPipeError):
            _close_stdout()
        if message:
            print(f"kttools: error: {_one_line(message)}", file=sys.stderr)
        return code
    return result if isinstance(result, int) else 0


class Terminated(BaseException):
    """SIGTERM: unwinds like Ctrl-C, so that partial files go and the terminal is left as it was."""


@contextlib.contextmanager
def _signals_caught() -> Iterator[None]:
    """SIGTERM raises Terminated in the main thread, SIGINT KeyboardInterrupt; elsewhere nothing changes.

    An exception from a signal handler may come up where it is swallowed (a bare except, a call from C++), or
    leave a compiled library half imported, which then cannot be imported again. So during an import the
    process ends by the signal itself, and after SIGTERM a timer looks again and raises once more unless the
    first is on its way up.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            _end_if_importing(number, frame)
        signal.setitimer(signal.ITIMER_REAL, LOOK_AGAIN_S)
        handled = sys.exc_info()[1]
        while handled is not None and not isinstance(handled, Terminated):
            handled = handled.__context__
        if handled is None:
            raise Terminated

    def interrupt(number: int, frame: FrameType | None) -> None:
        _end_if_importing(number, frame)
        signal.default_int_handler(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[signal.Signals, Handler] = {signal.SIGTERM: terminate, signal.SIGALRM: terminate}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        handlers[signal.SIGINT] = interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_if_importing(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        frame = frame.f_back


def explain(error: BaseException) -> tuple[str, int]:
    """(message or "", exit status) for anything a command can raise."""
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "", EXIT_INTERRUPTED
    if isinstance(error, Terminated):
        return "", EXIT_TERMINATED
    if isinstance(error, BrokenPipeError):
        return "", EXIT_RUNTIME
    if isinstance(error, KTError):
        return str(error) or type(error).__name__, error.exit_code
    if isinstance(error, click.ClickException):
        return _explain_usage(error)
    if isinstance(error, OSError):
        return _explain_os(error)
    if isinstance(error, MemoryError) or _is_torch_memory(error):
        return f"not enough memory: {error}".rstrip(": "), EXIT_RESOURCE
    return f"unexpected {type(error).__name__}: {error} (use --debug for the traceback)", EXIT_RUNTIME


def _explain_usage(error: click.ClickException) -> tuple[str, int]:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return "", EXIT_USAGE
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return f"{error.format_message()}{hint}", error.exit_code


def _explain_os(error: OSError) -> tuple[str, int]:
    what = error.strerror or str(error) or type(error).__name__
    message = f"{error.filename}: {what}" if error.filename is not None else what
    if error.errno in DISK_FULL:
        return message, EXIT_RESOURCE
    return message, EXIT_INPUT if isinstance(error, NOT_THERE) else EXIT_RUNTIME


def _is_torch_memory(error: BaseException) -> bool:
    """torch raises OutOfMemoryError on a GPU and a plain RuntimeError when its CPU allocator fails."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _one_line(message: str) -> str:
    """Nothing in it moves a terminal's cursor, whatever name of a stranger it quotes."""
    text = "; ".join(line.strip() for line in message.splitlines() if line.strip())
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _env_flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _close_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's last flush does not complain."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    os.close(sink)
