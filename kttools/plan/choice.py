"""A choice of formats, cache and devices for a model, what it takes, and the nearest choice that fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

from kttools.checkpoint.gguf import is_gguf
from kttools.families import SourceModel, open_config, open_model
from kttools.model_source import is_bundle
from kttools.quantize.blocks import default_cpu_format, default_gpu_format
from kttools.quantize.recipe import DEFAULT_GROUP_SIZE
from kttools.quantize.rules import KEPT_FORMAT
from kttools_runtime.errors import UsageError
from kttools_runtime.experts import pack_format
from kttools_runtime.hybrid.hot_request import HotRequest
from kttools_runtime.load_plan import SHORTEST_CACHE

from .layout import GPU_FORMATS, Layout, bundle_layout, smaller_cpu_formats, source_layout
from .memory import Machine, Needs, needs

MOST_GPUS = 4  # that a remedy asks for


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user may change. Formats are None for a bundle, which has its own.

    gpu_experts: routed experts on the GPUs, or None.
    """

    cpu_format: str | None
    gpu_format: str | None
    cache_len: int
    numa: str
    threads: int
    gpu_experts: HotRequest | None = None


class Subject(Protocol):
    """MODEL: its name, and its layout for a choice."""

    is_bundle: bool
    notices: list[str]
    default_cpu_format: str | None
    default_gpu_format: str | None

    def layout(self, choice: Choice) -> Layout: ...


class BundleSubject:
    """A bundle on disk."""

    is_bundle = True
    default_cpu_format: str | None = None
    default_gpu_format: str | None = None

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
        self.default_gpu_format: str | None = default_gpu_format(source)
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


def needs_of(subject: Subject, choice: Choice, machine: Machine) -> Needs:
    """What this choice takes."""
    layout = subject.layout(choice)
    return needs(layout, choice.cache_len, choice.numa, choice.threads, machine, choice.gpu_experts)


def nearest_fit(subject: Subject, choice: Choice, machine: Machine) -> tuple[Choice, Machine] | None:
    """The first of the smaller choices that fits; the machine differs by more GPUs of the same size alone."""
    for other, smaller in _smaller(choice, machine):
        found = needs_of(subject, smaller, other)
        asked = smaller.gpu_experts
        is_too_much = any(d.total > limit for d, limit in zip(found.devices, other.vram, strict=True))
        if asked is not None and not asked.is_auto and is_too_much:
            smaller = replace(smaller, gpu_experts=asked.with_number(found.most_per_layer))
            found = needs_of(subject, smaller, other)
        if found.fits(other):
            return smaller, other
    return None


def smallest(subject: Subject, choice: Choice, machine: Machine) -> tuple[int, int]:
    """RAM, and VRAM of the fullest GPU, of the smallest of those choices."""
    found = [needs_of(subject, replace(c, gpu_experts=None), m) for m, c in _smaller(choice, machine)]
    vram = min(max((device.total for device in n.devices), default=0) for n in found)
    return min(n.ram_total for n in found), vram


def _smaller(choice: Choice, machine: Machine) -> Iterator[tuple[Machine, Choice]]:
    """Without copies per node and with fewer experts on the GPUs, then with a shorter cache, smaller experts,
    smaller shards, more GPUs, and these together: what costs quality late, what costs money last."""
    numa = "shard" if choice.numa == "replicate" else choice.numa
    for other in _more_gpus(machine):
        for gpu in _gpu_formats(choice.gpu_format):
            for cpu in _cpu_formats(choice.cpu_format):
                for length in _shorter(choice.cache_len):
                    yield (
                        other,
                        replace(choice, cpu_format=cpu, gpu_format=gpu, cache_len=length, numa=numa),
                    )


def _more_gpus(machine: Machine) -> Iterator[Machine]:
    yield machine
    for count in range(len(machine.vram) + 1, MOST_GPUS + 1 if machine.vram else 0):
        yield replace(machine, vram=(min(machine.vram),) * count)


def _gpu_formats(name: str | None) -> tuple[str | None, ...]:
    """This format and the smaller ones; below GGUF's own blocks there is int4."""
    if name is None:
        return (None,)
    return (name, GPU_FORMATS[-1]) if name == KEPT_FORMAT else GPU_FORMATS[GPU_FORMATS.index(name) :]


def _cpu_formats(name: str | None) -> tuple[str | None, ...]:
    """This format, as the user spelt it, and the smaller ones."""
    return (None,) if name is None else (name, *smaller_cpu_formats(pack_format(name)))


def _shorter(cache_len: int) -> Iterator[int]:
    yield cache_len
    while cache_len > SHORTEST_CACHE:
        cache_len = max(SHORTEST_CACHE, cache_len // 2)
        yield cache_len
