"""The words of a format, from tests/fuzz/dictionaries/<target>.txt: what random bytes would never become."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "dictionaries"


def words(target: str) -> tuple[bytes, ...]:
    """One a line, with Python's escapes (a character above 255 as UTF-8); () for a target without a file."""
    file = FOLDER / f"{target}.txt"
    if not file.is_file():
        return ()
    lines = file.read_text(encoding="ascii").splitlines()
    return tuple(_bytes(line) for line in lines if line.strip() and not line.startswith("#"))


def _bytes(line: str) -> bytes:
    text = line.encode("ascii").decode("unicode_escape")
    is_bytes = all(ord(character) < 256 for character in text)
    return text.encode("latin-1") if is_bytes else text.encode("utf-8", "surrogatepass")
