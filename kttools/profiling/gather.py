"""The collecting steps of `kttools profile-experts`: text into shards, shards into a profile."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import kttools_runtime as kt
from kttools_runtime.errors import InvalidInputError, ResourceError
from kttools_runtime.layer_stream import LayerStream
from kttools_runtime.manifest import read_manifest

from .collect import Collected, Part, Recording, Task, collect, limited, tasks
from .data import DataSpec, documents, provenance
from .data_spec import parse_specs
from .layerwise import LayerRunner, Window
from .profile_file import Profile, merge
from .record import Progress
from .streamed import WORK_DIR, collect_streamed, disk_bytes

GIB = float(1 << 30)
WHOLE = Part()


@dataclass(frozen=True, slots=True)
class TextLimits:
    """Tokens per window and document, and per domain (None: all)."""

    window_tokens: int = 1024
    domain_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One part of a collection: all that its shards depend on, and where they go.

    bundle: the model. data: specs, one per domain. stream_layers: hold one layer in memory at a time (None:
    when the bundle is larger than the RAM available). threads, isa: as in kttools_runtime.load.
    """

    bundle: Path
    data: tuple[str, ...]
    output: Path
    limits: TextLimits
    gram_every: int
    part: Part = WHOLE
    stream_layers: bool | None = None
    threads: int | None = None
    isa: str | None = None

    @property
    def is_streamed(self) -> bool:
        if self.stream_layers is None:
            return bundle_bytes(self.bundle) > psutil.virtual_memory().available
        return self.stream_layers


def collect_part(
    job: Job,
    say: Callable[[str], object] = lambda line: None,
    start: Progress = lambda total: None,
    on_tokens: Progress = lambda count: None,
    runner: LayerRunner | None = None,
) -> Collected:
    """Makes the shards of one part; where this runs changes nothing in them.

    start: told the number of tokens before the first. runner: of the job's model, where it is loaded already.
    Raises InvalidInputError (text, model, shards of another run), ResourceError when the hidden states of a
    streamed model will not fit on the disk.
    """
    if runner is None:
        runner = open_runner(job.bundle, job.threads, job.isa, job.is_streamed)
    streamed = isinstance(runner.model.layers, LayerStream)
    chosen = plan(runner, job)
    say(_plan_line(job, chosen, streamed, runner.config.hidden_size))
    (job.output / "shards").mkdir(parents=True, exist_ok=True)  # a part may have nothing to make
    start(sum(task.tokens for task in chosen))
    return (collect_streamed if streamed else collect)(runner, chosen, on_tokens)


def parts(job: Job, count: int) -> list[Job]:
    """The same work in `count` parts."""
    return [dataclasses.replace(job, part=Part(index, count)) for index in range(1, count + 1)]


def open_runner(bundle: Path, threads: int | None, isa: str | None, streamed: bool = False) -> LayerRunner:
    """A bundle with its native router."""
    return LayerRunner(kt.load(bundle, threads=threads, expert_table="none", isa=isa, stream_layers=streamed))


def plan(runner: LayerRunner, job: Job) -> list[Task]:
    """The shards that a part of the work has to make."""
    how = Recording(job.limits.window_tokens, job.gram_every)
    name = job.bundle.name
    found: list[Task] = []
    for spec in parse_specs(job.data):
        chosen, origin = domain_windows(runner, spec, job.limits), provenance(spec)
        found += tasks(runner, spec.domain, chosen, origin, job.output, how=how, model_name=name)
    return job.part.of(found)


def domain_windows(runner: LayerRunner, spec: DataSpec, limits: TextLimits) -> list[Window]:
    """A domain's documents as windows. Raises InvalidInputError or DownloadError (kttools.profiling.data)."""
    read = documents(spec, runner.model.tokenizer)
    found = list(limited(read, limits.window_tokens, limits.domain_tokens))
    if not found:
        raise InvalidInputError(f"{spec.text}: no document has two tokens or more")
    return found


def merge_directories(inputs: Sequence[Path], output: Path) -> Profile:
    """All shards of the directories into one profile in `output`. Raises InvalidInputError."""
    missing = [folder for folder in inputs if not (folder / "shards").is_dir()]
    if missing:
        raise InvalidInputError(f"{missing[0]}: has no shards/; kttools profile-experts collect makes them")
    paths = [path for folder in inputs for path in sorted((folder / "shards").glob("*.safetensors"))]
    return merge(paths, output)


def bundle_bytes(bundle: Path) -> int:
    """Bytes of a bundle's files. Raises InvalidInputError when it is none."""
    return sum(entry.bytes for entry in read_manifest(bundle).files.values())


def _plan_line(job: Job, chosen: list[Task], streamed: bool, hidden_size: int) -> str:
    """What is about to happen. Raises ResourceError when it will not fit on the disk."""
    tokens = sum(task.tokens for task in chosen)
    ram = psutil.virtual_memory().available
    line = (
        f"plan: {len(chosen)} shards of {tokens} tokens, outputs of one token in {job.gram_every}; bundle "
        f"{bundle_bytes(job.bundle) / GIB:.2f} GiB, {ram / GIB:.1f} GiB of RAM available: "
    )
    if not streamed:
        return line + "the layers stay in memory"
    job.output.mkdir(parents=True, exist_ok=True)
    needed, free = disk_bytes(chosen, hidden_size), shutil.disk_usage(job.output).free
    if needed > free:
        raise ResourceError(
            f"{job.output}: {needed / GIB:.1f} GiB of disk needed for hidden states, {free / GIB:.1f} GiB "
            "free; give fewer --tokens, or a --shard I/N at a time"
        )
    return line + f"one layer at a time, {needed / GIB:.2f} GiB of hidden states in {WORK_DIR}/"
