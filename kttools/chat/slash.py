"""The / commands of the interactive chat, as a table."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kttools_runtime.errors import InvalidInputError, UsageError

from .prompt_text import read_text_file

if TYPE_CHECKING:
    from .terminal import Terminal

# /set name -> (where, field, type); "sampling" is SamplingParams, "options" is ChatOptions
SETTINGS: dict[str, tuple[str, str, Callable[[str], float | int]]] = {
    "temp": ("sampling", "temperature", float),
    "top_k": ("sampling", "top_k", int),
    "top_p": ("sampling", "top_p", float),
    "min_p": ("sampling", "min_p", float),
    "repeat_penalty": ("sampling", "repetition_penalty", float),
    "seed": ("sampling", "seed", int),
    "n": ("options", "max_new_tokens", int),
}


@dataclass(frozen=True, slots=True)
class SlashCommand:
    """run(terminal, argument) returns False to leave the chat."""

    usage: str
    help: str
    run: Callable[["Terminal", str], bool]


def run(terminal: "Terminal", line: str) -> bool:
    """Runs one / line; False when the user leaves. Raises UsageError for an unknown command."""
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        raise UsageError(f"unknown command {name}; /help lists them (begin with a space to send it as text)")
    return command.run(terminal, argument.strip())


def _help(terminal: "Terminal", _: str) -> bool:
    for command in COMMANDS.values():
        terminal.say(f"  {command.usage:<22} {command.help}")
    terminal.say('  a \\ at the end of a line continues it; """ begins and ends a block of lines')
    return True


def _clear(terminal: "Terminal", _: str) -> bool:
    terminal.session.clear()
    terminal.attachment = ""
    terminal.say("(new conversation)")
    return True


def _regenerate(terminal: "Terminal", _: str) -> bool:
    terminal.regenerate()
    return True


def _read(terminal: "Terminal", argument: str) -> bool:
    if not argument:
        raise UsageError("/read needs a file name")
    text = read_text_file(Path(argument).expanduser())
    terminal.attachment += f"{text}\n\n"
    terminal.say(f"({len(text)} characters; they go before your next message)")
    return True


def _system(terminal: "Terminal", argument: str) -> bool:
    session = terminal.session
    if not argument:
        terminal.say(f"system: {session.system}" if session.system else "(no system message)")
        return True
    session.system = None if argument == "none" else argument
    session.clear()
    terminal.say("(system message set, new conversation)")
    return True


def _set(terminal: "Terminal", argument: str) -> bool:
    session = terminal.session
    if argument:
        name, _, text = argument.replace("=", " ").partition(" ")
        _change(terminal, name.lstrip("-").replace("-", "_"), text.strip())
    for name, (where, field, _type) in SETTINGS.items():
        holder = session.options.sampling if where == "sampling" else session.options
        terminal.say(f"  {name} = {getattr(holder, field)}")
    return True


def _change(terminal: "Terminal", name: str, text: str) -> None:
    if name not in SETTINGS:
        raise UsageError(f"unknown setting {name!r}; valid: {', '.join(SETTINGS)}")
    where, field, convert = SETTINGS[name]
    try:
        value = None if text == "none" and name in ("seed", "n") else convert(text)
    except ValueError as error:
        raise UsageError(f"/set {name} needs a number, got {text!r}") from error
    session = terminal.session
    options = session.options
    if where == "sampling":
        changed: dict[str, Any] = {field: value}
        session.options = replace(options, sampling=replace(options.sampling, **changed))
    else:
        session.options = replace(options, max_new_tokens=None if value is None or value < 0 else int(value))


def _stats(terminal: "Terminal", _: str) -> bool:
    session = terminal.session
    terminal.say(session.stats.line(terminal.load_s) if session.stats else "(no answer yet)")
    cache = session.cache
    terminal.say(f"cache: {cache.length} of {cache.capacity} tokens; {len(session.messages)} messages")
    return True


def _save(terminal: "Terminal", argument: str) -> bool:
    if not argument:
        raise UsageError("/save needs a file name")
    session = terminal.session
    system = [{"role": "system", "content": session.system}] if session.system else []
    document = {"messages": [*system, *session.messages]}
    write_new_file(Path(argument).expanduser(), json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    terminal.say(f"(saved to {argument})")
    return True


def _exit(_: "Terminal", __: str) -> bool:
    return False


def write_new_file(path: Path, text: str) -> None:
    """A complete new file or none. Raises InvalidInputError when it exists or cannot be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.link(part, path)  # fails when path exists, unlike a rename
    except FileExistsError as error:
        raise InvalidInputError(f"{path} exists already; choose another name") from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


COMMANDS: dict[str, SlashCommand] = {
    "/help": SlashCommand("/help", "this list", _help),
    "/clear": SlashCommand("/clear", "forget the conversation", _clear),
    "/regen": SlashCommand("/regen", "answer the last message again", _regenerate),
    "/read": SlashCommand("/read FILE", "put a file's text before the next message", _read),
    "/system": SlashCommand("/system [TEXT|none]", "show or set the system message", _system),
    "/set": SlashCommand("/set [NAME VALUE]", f"show or change: {', '.join(SETTINGS)}", _set),
    "/stats": SlashCommand("/stats", "speed of the last answer, and how full the cache is", _stats),
    "/save": SlashCommand("/save FILE", "write the conversation as JSON to a new file", _save),
    "/exit": SlashCommand("/exit", "leave (also Ctrl-D)", _exit),
}
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help", "/regenerate": "/regen"}
