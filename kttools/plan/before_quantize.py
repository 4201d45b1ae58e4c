"""Before a checkpoint is quantised in order to be loaded: would the result fit? Headers alone are read."""

from pathlib import Path

from kttools.bundle.render import size
from kttools.families import open_model
from kttools_runtime import memory
from kttools_runtime.env import default_threads
from kttools_runtime.errors import ResourceError

from .choice import Choice, SourceSubject, nearest_fit, needs_of
from .memory import Machine, default_cache_len


def check_loadable(
    source: Path,
    weights: Path | None = None,
    cache_len: int | None = None,
    numa: str = "auto",
    threads: int | None = None,
) -> None:
    """Raises ResourceError, with the nearest plan that fits, when a bundle of the default formats will not
    fit into the RAM that is free; and what reading headers raises. weights: GGUF that replaces source's."""
    subject = SourceSubject(open_model(source, weights))
    gpu_format = subject.default_gpu_format
    choice = Choice(subject.default_cpu_format, gpu_format, 1, numa, threads or default_threads())
    length = cache_len or default_cache_len(subject.layout(choice).config)
    choice = Choice(choice.cpu_format, choice.gpu_format, length, numa, choice.threads)
    need = needs_of(subject, choice, Machine(0, (), 0))
    free = memory.available_bytes()  # beside what this process holds already
    if need.ram.total <= free:
        return
    what = f"{source}: its bundle will not load: {size(need.ram.total)} of RAM needed, {size(free)} available"
    found = nearest_fit(subject, choice, Machine(free + need.libraries, (), 0))
    if found is None:
        raise ResourceError(f"{what}; no plan fits (kttools plan shows the parts)")
    fit, _ = found
    formats = f"--cpu-format {fit.cpu_format} --gpu-format {fit.gpu_format}"
    rest = f"--cache_lens {fit.cache_len} --numa {fit.numa}"
    raise ResourceError(f"{what}; nearest plan that fits: kttools quantize {formats}, then load with {rest}")
