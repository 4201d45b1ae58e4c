"""The report of a profile: report.html, summary.md and summary.json; PNGs where matplotlib is installed."""

import json
from pathlib import Path
from typing import Any

from kttools.bundle.atomic import atomic_write_bytes
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.strict_json import read_object

from .facts import Facts, ProfileLike
from .page import render_page
from .pictures import write_pictures
from .summary import render_markdown, summary

__all__ = ["Facts", "render", "write_report"]

PROFILE_NAME = "profile.expert-profile.json"
EVALUATION_NAME = "evaluation.json"


def write_report(directory: Path) -> list[Path]:
    """Write the report of a profile directory beside its files; returns what was written.

    The table and the evaluation may be missing: the report shows what is there. Raises InvalidInputError when
    there is no profile, or several tables and no evaluation that names one.
    """
    facts = read_facts(directory)
    written = []
    for name, data in render(facts).items():
        path = directory / name
        atomic_write_bytes(path, data)
        written.append(path)
    return written + write_pictures(facts, directory)


def render(facts: Facts) -> dict[str, bytes]:
    """File name -> content."""
    try:
        document = json.dumps(summary(facts), indent=1, sort_keys=True, allow_nan=False)
        page, markdown = render_page(facts), render_markdown(facts)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InvalidInputError(
            f"the report's input lacks or breaks {error}; make the files again"
        ) from error
    texts = {"report.html": page, "summary.md": markdown, "summary.json": document + "\n"}
    return {name: text.encode("utf-8") for name, text in texts.items()}


def read_facts(directory: Path) -> Facts:
    """The profile, table and evaluation of a directory that `kttools profile-experts` wrote."""
    from kttools.profiling.profile_file import read_profile

    profile_path = directory / PROFILE_NAME
    if not profile_path.is_file():
        raise InvalidInputError(f"{profile_path}: no such file; run `kttools profile-experts collect` first")
    profile: ProfileLike = read_profile(profile_path)
    evaluation_path = directory / EVALUATION_NAME
    evaluation = read_object(evaluation_path) if evaluation_path.is_file() else None
    facts = Facts(profile, _read_table(directory, evaluation), evaluation)
    _check_same_model(facts, directory)
    return facts


def _read_table(directory: Path, evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    tables = {path: read_object(path) for path in sorted(directory.glob("*.expert-table.json"))}
    judged = (evaluation or {}).get("table")
    named = [table for path, table in tables.items() if judged in (table.get("name"), _stem(path))]
    kinds = [table for table in tables.values() if (table.get("policy") or {}).get("kind") == judged]
    chosen = named or kinds or list(tables.values())
    if len(chosen) > 1:
        names = ", ".join(path.name for path in tables)
        raise InvalidInputError(f"{directory}: several tables ({names}) and no evaluation of one; keep one")
    return chosen[0] if chosen else None


def _stem(path: Path) -> str:
    return path.name.removesuffix(".expert-table.json")


def _check_same_model(facts: Facts, directory: Path) -> None:
    expected = facts.profile.header["fingerprint"]
    for name, document in (("table", facts.table), ("evaluation", facts.evaluation)):
        found = (document or {}).get("fingerprint", expected)
        if found != expected:
            raise InvalidInputError(
                f"{directory}: the {name} is of another model: fingerprint {found}, expected {expected}"
            )
