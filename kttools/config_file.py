"""kttools.toml: option values that flags and environment variables override.

    cpu_infer = 32          # any command that has the option
    [chat]                  # only this command
    temp = 0.6

./kttools.toml comes before the one in the user's configuration directory; in one file a command's table comes
before the top level. Keys are the long option names, with - or _. trusted_keys (and a require_signature that
is not true) counts only in the user's own file.
"""

import importlib
from pathlib import Path
from typing import Any

from kttools_runtime.errors import InvalidInputError

from .dirs import config_dir

NAME = "kttools.toml"
# Whom the user trusts is not for a directory to say that the user happens to be in: it may be a bundle's own.
TRUST_KEYS = ("trusted_keys", "signer", "key")
MAX_BYTES = 1 << 20
Scalar = str | int | float | bool


def config_paths() -> list[Path]:
    """The files that exist, the most important last."""
    return [path for path in (config_dir() / NAME, Path.cwd() / NAME) if path.is_file()]


def read_config(path: Path) -> dict[str, Any]:
    """The parsed file. Raises InvalidInputError when it is too large or not TOML."""
    try:
        toml = importlib.import_module("tomllib")
    except ModuleNotFoundError:  # Python 3.10
        toml = importlib.import_module("tomli")
    try:
        data = path.read_bytes()
        if len(data) > MAX_BYTES:
            raise InvalidInputError(f"{path}: {len(data)} bytes, the limit is {MAX_BYTES}")
        parsed: dict[str, Any] = toml.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise InvalidInputError(f"{path}: not valid TOML: {error}") from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from error
    return parsed


def option_values(command: str, known: dict[str, str]) -> dict[str, Any]:
    """Values for one command's parameters from all files.

    known: normalised spelling (with _) -> parameter name. Top-level keys of other commands are skipped; a key
    of the command's own table that it does not have raises InvalidInputError.
    """
    values: dict[str, Any] = {}
    for path in config_paths():
        parsed = read_config(path)
        top = {key: value for key, value in parsed.items() if not isinstance(value, dict)}
        values.update(_matched(path, top, known, strict=False))
        table = parsed.get(command, {})
        values.update(_matched(path, table if isinstance(table, dict) else {}, known, strict=True))
    return values


def _matched(path: Path, entries: dict[str, Any], known: dict[str, str], strict: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in entries.items():
        name = known.get(key.replace("-", "_").lower())
        if name is None:
            if strict:
                raise InvalidInputError(f"{path}: unknown option {key!r}; known: {', '.join(sorted(known))}")
            continue
        _check_may_say(path, key.replace("-", "_").lower(), value)
        if not _is_plain(value):
            raise InvalidInputError(f"{path}: {key} must be a string, number, boolean or a list of them")
        found[name] = value
    return found


def _check_may_say(path: Path, key: str, value: object) -> None:
    """Raises InvalidInputError for a file of the current directory that wants to loosen what is trusted."""
    own = config_dir() / NAME
    if path == own:
        return
    if key in TRUST_KEYS or (key == "require_signature" and value is not True):
        raise InvalidInputError(f"{path}: {key} may only be set in {own}")


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, Scalar) for item in value)
    return isinstance(value, Scalar)
