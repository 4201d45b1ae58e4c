"""What `--data` and `--eval` accept: `[domain=]kind:LOCATION[#field]`, one domain of text each.

python=jsonl:python.jsonl#text      zh=parquet:DIR/*.parquet#content      notes=text:notes/*.txt
a=arrow:DIR/*.arrow#text            chat=jsonl:chat.jsonl#messages        hf:org/name@config:split#field
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kttools_runtime.errors import UsageError

# kind -> (builder of the `datasets` library, default field)
LOCAL_KINDS = {
    "jsonl": ("json", "text"),
    "parquet": ("parquet", "text"),
    "arrow": ("arrow", "text"),
    "text": ("text", "text"),
}
HUB_KIND = "hf"
KIND_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
EXAMPLE = "for example python=jsonl:FILE#text or hf:org/name@config:split#text"
_DOMAIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=")
_KIND = re.compile(r"([a-z]+):")
_HUB = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<config>[^:@#]+))?(?::(?P<split>[\w.\[\]:%+-]+))?")


@dataclass(frozen=True, slots=True)
class DataSpec:
    """One domain. location: a path or glob as the user wrote it, or a hub id (then config and split)."""

    text: str
    domain: str
    kind: str
    location: str
    field: str
    config: str | None = None
    split: str | None = None

    @property
    def is_hub(self) -> bool:
        return self.kind == HUB_KIND


def parse_spec(text: str) -> DataSpec:
    """A data spec from its string. Raises UsageError naming the part that is wrong."""
    rest = text
    domain = _DOMAIN.match(rest)
    if domain:
        rest = rest[domain.end() :]
    rest, _, field = rest.partition("#") if rest.count("#") <= 1 else rest.rpartition("#")
    kind, location = _kind_and_location(text, rest)
    if not location:
        raise UsageError(f"data spec {text!r} names no file or data set; {EXAMPLE}")
    if kind == HUB_KIND:
        return _hub_spec(text, domain[1] if domain else None, location, field or "text")
    name = domain[1] if domain else _name_of(location)
    return DataSpec(text, name, kind, location, field or LOCAL_KINDS[kind][1])


def parse_specs(texts: Sequence[str]) -> list[DataSpec]:
    """Several specs, one per domain. Raises UsageError when two have the same domain name."""
    specs = [parse_spec(text) for text in texts]
    seen: dict[str, str] = {}
    for spec in specs:
        if spec.domain in seen:
            raise UsageError(
                f"data specs {seen[spec.domain]!r} and {spec.text!r} have the same domain name "
                f"{spec.domain!r}; write NAME= in front of one"
            )
        seen[spec.domain] = spec.text
    return specs


def _kind_and_location(text: str, rest: str) -> tuple[str, str]:
    kinds = (*LOCAL_KINDS, HUB_KIND)
    match = _KIND.match(rest)
    if match and match[1] in kinds:
        return match[1], rest[match.end() :]
    guessed = KIND_OF_SUFFIX.get(Path(rest).suffix)
    if match is None and guessed:
        return guessed, rest
    found = f"unknown kind {match[1]!r}" if match else "no kind"
    raise UsageError(f"data spec {text!r}: {found}, expected one of {', '.join(kinds)}; {EXAMPLE}")


def _hub_spec(text: str, domain: str | None, location: str, field: str) -> DataSpec:
    match = _HUB.fullmatch(location)
    if match is None:
        raise UsageError(f"data spec {text!r}: expected hf:org/name[@config][:split][#field]")
    name = domain or match["id"].rpartition("/")[2]
    return DataSpec(text, name, HUB_KIND, match["id"], field, match["config"], match["split"] or "train")


def _name_of(location: str) -> str:
    """A domain name for a path: its file name up to the first dot, the folder's for a glob."""
    path = Path(location)
    stem = path.name.partition(".")[0]
    return stem if stem and not re.search(r"[*?\[]", stem) else path.parent.name or "data"
