"""A choice of formats and cache for a model, its sizes, and the nearest choice that fits into less RAM."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

from kttools.checkpoint.gguf import is_gguf
from kttools.families import SourceModel, open_config, open_model
from kttools.model_source import is_bundle
from kttools.quantize.blocks import default_cpu_format
from kttools.quantize.recipe import DEFAULT_GROUP_SIZE
from kttools_runtime.errors import UsageError
from kttools_runtime.experts import pack_format

from .layout import CPU_FORMATS, GPU_FORMATS, Layout, bundle_layout, source_layout
from .memory import RamPlan, ram_plan

SHORTEST_CACHE = 2048
BELOW_KEPT = ("int4_g64", "int4_g128")  # what is smaller than the blocks of a Q4_K_M file


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user may change. Formats are None for a bundle, which has its own."""

    cpu_format: str | None
    gpu_format: str | None
    cache_len: int
    numa: str
    threads: int


class Subject(Protocol):
    """MODEL: its name, and its layout for a choice."""

    is_bundle: bool
    notices: list[str]
    default_cpu_format: str | None

    def layout(self, choice: Choice) -> Layout: ...


class BundleSubject:
    """A bundle on disk."""

    is_bundle = True
    default_cpu_format: str | None = None

    def __init__(self, path: Path) -> None:
        self.notices: list[str] = []
        self._layout = bundle_layout(path)

    def layout(self, choice: Choice) -> Layout:
        """Raises UsageError for a format: the bundle has been made."""
        if choice.cpu_format is not None or choice.gpu_format is not None:
            raise UsageError("MODEL is a bundle, whose formats are fixed: plan its checkpoint for others")
        return self._layout


class SourceSubject:
    """A checkpoint, GGUF, or a config.json alone."""

    is_bundle = False

    def __init__(self, source: SourceModel) -> None:
        self.notices = source.notices
        self.default_cpu_format: str | None = default_cpu_format(source)
        self._layout = cache(
            lambda cpu, gpu: source_layout(source, pack_format(cpu), gpu, DEFAULT_GROUP_SIZE)
        )

    def layout(self, choice: Choice) -> Layout:
        return self._layout(choice.cpu_format, choice.gpu_format)


def open_subject(path: Path) -> Subject:
    """Reads headers, config.json or bundle.json. Raises as open_model and load_manifest do."""
    if is_bundle(path):
        return BundleSubject(path)
    is_config_alone = path.is_dir() and not is_gguf(path) and not any(path.glob("*.safetensors"))
    return SourceSubject(open_config(path) if is_config_alone else open_model(path))


def ram(subject: Subject, choice: Choice) -> RamPlan:
    """RAM of this choice."""
    return ram_plan(subject.layout(choice), choice.cache_len, choice.numa, choice.threads)


def nearest_fit(subject: Subject, choice: Choice, limit_bytes: int) -> Choice | None:
    """The first choice that fits: without copies per node, with a shorter cache, with smaller experts, with
    smaller shards, and these together, the quality of the weights given up last."""
    return next((c for c in _smaller(choice) if ram(subject, c).total <= limit_bytes), None)


def smallest(subject: Subject, choice: Choice) -> int:
    """RAM of the smallest of those choices."""
    return min(ram(subject, c).total for c in _smaller(choice))


def _smaller(choice: Choice) -> Iterator[Choice]:
    numa = "shard" if choice.numa == "replicate" else choice.numa
    for gpu in _below(choice.gpu_format, GPU_FORMATS):
        for cpu in _below(choice.cpu_format, CPU_FORMATS):
            for length in _shorter(choice.cache_len):
                yield replace(choice, cpu_format=cpu, gpu_format=gpu, cache_len=length, numa=numa)


def _below(name: str | None, names: tuple[str, ...]) -> tuple[str | None, ...]:
    """This format and the smaller ones; as the user spelt it where it stays."""
    if name is None:
        return (None,)
    full = name if name in names else pack_format(name)
    smaller = names[names.index(full) + 1 :] if full in names else BELOW_KEPT
    return (name, *smaller)


def _shorter(cache_len: int) -> Iterator[int]:
    yield cache_len
    while cache_len > SHORTEST_CACHE:
        cache_len = max(SHORTEST_CACHE, cache_len // 2)
        yield cache_len
