"""The collecting steps of `kttools profile-experts`: text into shards, shards into a profile."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kttools_runtime.errors import InvalidInputError

from .collect import Part, Recording, Task, limited, tasks
from .data import DataSpec, documents, provenance
from .data_spec import parse_specs
from .layerwise import LayerRunner, Window
from .profile_file import Profile, merge


@dataclass(frozen=True, slots=True)
class TextLimits:
    """Tokens per window and document, and per domain (None: all)."""

    window_tokens: int = 1024
    domain_tokens: int | None = None


def domain_windows(runner: LayerRunner, spec: DataSpec, limits: TextLimits) -> list[Window]:
    """A domain's documents as windows. Raises InvalidInputError or DownloadError (kttools.profiling.data)."""
    read = documents(spec, runner.model.tokenizer)
    found = list(limited(read, limits.window_tokens, limits.domain_tokens))
    if not found:
        raise InvalidInputError(f"{spec.text}: no document has two tokens or more")
    return found


def plan(
    runner: LayerRunner,
    data: Sequence[str],
    output: Path,
    limits: TextLimits,
    gram_every: int,
    model_name: str,
    part: Part,
) -> list[Task]:
    """The shards of all domains that a part of the work has to make."""
    how = Recording(limits.window_tokens, gram_every)
    found: list[Task] = []
    for spec in parse_specs(data):
        chosen = domain_windows(runner, spec, limits)
        found += tasks(
            runner, spec.domain, chosen, provenance(spec), output, how=how, model_name=model_name, part=part
        )
    return found


def merge_directories(inputs: Sequence[Path], output: Path) -> Profile:
    """All shards of the directories into one profile in `output`. Raises InvalidInputError."""
    missing = [folder for folder in inputs if not (folder / "shards").is_dir()]
    if missing:
        raise InvalidInputError(f"{missing[0]}: has no shards/; run kttools profile-experts collect -o there")
    paths = [path for folder in inputs for path in sorted((folder / "shards").glob("*.safetensors"))]
    return merge(paths, output)
