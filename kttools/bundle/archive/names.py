"""Names a member of an archive may have: plain ones that every common file system can hold, side by side.

Stricter than a bundle on disk: the archive may be unpacked where upper and lower case are one, or where a
device answers to a name.
"""

import re
from collections.abc import Iterable

MAX_NAME_BYTES = 512
MAX_PART_BYTES = 255
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
# Device names of Windows, with any extension.
_RESERVED = re.compile(r"(con|prn|aux|nul|conin|conout|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def name_problem(name: str) -> str | None:
    """Why a single name is refused, or None.

    ASCII letters, digits and `. _ -` between slashes: there is no absolute path, no `..`, no NUL, no
    backslash, and nothing that Unicode normalisation could fold.
    """
    if not 0 < len(name) <= MAX_NAME_BYTES:
        return f"a name of {len(name)} characters, expected 1 to {MAX_NAME_BYTES}"
    for part in name.split("/"):
        if not _PART.fullmatch(part) or len(part) > MAX_PART_BYTES:
            return "not a plain relative path"
        if _RESERVED.fullmatch(part) or part.endswith("."):
            return f"{part!r} is reserved on some systems"
    return None


def names_problem(names: Iterable[str]) -> str | None:
    """Why names cannot lie in one folder, or None: each plain, and no two the same where case is ignored."""
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name in names:
        problem = name_problem(name)
        if problem:
            return f"member {name!r:.200}: {problem}"
        if name.lower() in files:
            return f"member {name!r:.200} is there twice, or differs from another only in case"
        files[name.lower()] = name
        problem = _folder_problem(name, folders)
        if problem:
            return problem
    both = files.keys() & folders.keys()
    return f"member {files[min(both)]!r:.200} is both a file and a folder" if both else None


def _folder_problem(name: str, folders: dict[str, str]) -> str | None:
    parts = name.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        folder = "/".join(parts[:depth])
        other = folders.setdefault(folder.lower(), folder)
        if other != folder:
            return f"folders {other!r:.200} and {folder!r:.200} are one where case is ignored"
    return None
