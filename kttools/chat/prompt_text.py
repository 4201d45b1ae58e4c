"""Where a one-shot prompt comes from: an option, a file, or a pipe."""

import sys
from pathlib import Path
from typing import BinaryIO

import click

from kttools_runtime.errors import InvalidInputError

MAX_PROMPT_BYTES = 64 << 20


def read_text_file(path: Path) -> str:
    """A UTF-8 file without its last line break. Raises InvalidInputError when it cannot be."""
    try:
        with path.open("rb") as file:
            return _decode(file, str(path))
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from error


def one_shot_prompt(prompt: str | None, prompt_file: str | None) -> str | None:
    """The prompt of -p, --prompt_file (- is stdin) or a pipe; None when stdin is a terminal: interactive.

    Raises a usage error for both options, InvalidInputError for an empty or unreadable prompt.
    """
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("give either -p or --prompt_file")
    if prompt is not None:
        return _non_empty(prompt, "-p")
    if prompt_file is not None and prompt_file != "-":
        return _non_empty(read_text_file(Path(prompt_file)), prompt_file)
    if prompt_file is None and sys.stdin.isatty():
        return None
    return _non_empty(_decode(sys.stdin.buffer, "stdin"), "stdin")


def _decode(file: BinaryIO, name: str) -> str:
    data = file.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise InvalidInputError(f"{name}: larger than {MAX_PROMPT_BYTES} bytes")
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{name}: not UTF-8 at byte {error.start}") from error


def _non_empty(text: str, name: str) -> str:
    if not text.strip():
        raise InvalidInputError(f"the prompt is empty ({name})")
    return text
