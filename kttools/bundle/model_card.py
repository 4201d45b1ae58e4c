"""Licence and model card of a checkpoint: which files they are, and what the card's front matter says.

They are copied into the bundle byte by byte (model-card/): who gets the weights gets their terms, too.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from kttools_runtime.errors import InvalidInputError
from kttools_runtime.manifest import License
from kttools_runtime.strict_json import read_bounded

CARD_FOLDER = "model-card"
CARD_NAME = "README.md"
LICENSE_NAME = re.compile(r"(?i)(licen[cs]e|notice|copying|use_policy)([._ -].*)?")
MAX_CARD_BYTES = 8 << 20
MAX_FILES = 32
MAX_FIELD = 200
_FIELD = re.compile(r"(license|license_name|license_link):\s*(.*)")
_ITEM = re.compile(r"\s*-\s+(.+)")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """files: path in the bundle -> the file of the checkpoint; license.files are among them."""

    files: dict[str, Path]
    license: License
    card: str | None


def find_model_card(folder: Path | None) -> ModelCard:
    """The card and licence texts of a checkpoint's directory; none of a file without one (GGUF).

    Raises InvalidInputError for a card that is too large or not UTF-8.
    """
    if folder is None or not folder.is_dir():
        return ModelCard({}, License(), None)
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if LICENSE_NAME.fullmatch(file.name) and file.is_file() and len(files) < MAX_FILES:
            files[_free_name(file.name, files)] = file
    texts = tuple(files)
    card = folder / CARD_NAME
    if not card.is_file():
        return ModelCard(files, License(files=texts), None)
    files[f"{CARD_FOLDER}/{CARD_NAME}"] = card
    fields = front_matter(read_bounded(card, MAX_CARD_BYTES), str(card))
    license = License(fields.get("license"), fields.get("license_name"), fields.get("license_link"), texts)
    return ModelCard(files, license, f"{CARD_FOLDER}/{CARD_NAME}")


def front_matter(data: bytes, where: str) -> dict[str, str]:
    """license, license_name and license_link of the block between two lines of --- that a card begins with.

    One line each, or a list of lines, which is joined; anything else of YAML is not looked at. A value that
    could not be printed as it stands is left out. Raises InvalidInputError when the card is not UTF-8.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{where}: not UTF-8 at byte {error.start}") from None
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, list[str]] = {}
    values: list[str] | None = None
    for line in lines[1:]:
        if line.strip() == "---":
            break
        field, item = _FIELD.match(line), _ITEM.match(line)
        if field:
            values = found.setdefault(field[1], [])
            values.extend([field[2]] if field[2].strip() else [])
        elif item and values is not None:
            values.append(item[1])
        else:
            values = None
    texts = {key: ", ".join(value.strip().strip("'\"") for value in values) for key, values in found.items()}
    return {key: text for key, text in texts.items() if 0 < len(text) <= MAX_FIELD and text.isprintable()}


def _free_name(name: str, taken: dict[str, Path]) -> str:
    """A path the manifest allows, and that no other differs from in case alone."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name)[:100]
    used = {path.lower() for path in taken}
    candidates = [plain, *(f"{plain}-{number}" for number in range(2, MAX_FILES + 2))]
    return next(f"{CARD_FOLDER}/{n}" for n in candidates if f"{CARD_FOLDER}/{n}".lower() not in used)
