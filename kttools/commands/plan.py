"""kttools plan: what a model takes and at most gives, before anything is downloaded or written."""

import json
import re
from pathlib import Path
from typing import Any

import click

from kttools import options
from kttools.commands.quantize import CPU_FORMATS
from kttools.model_source import resolve_model
from kttools_runtime.errors import ResourceError

EPILOG = """\b
Examples:
  kttools plan ./DeepSeek-V3
  kttools plan ./DeepSeek-V3 --dram 512G --cpu-format int4 --bandwidth 250 --tops 50
"""
UNITS = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
DEFAULT_DISK_GB_S = 2.0


class MemorySize(click.ParamType):
    """512G, 1.5T, 65536M: binary units, as memory is sold."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([MGT])(?:i?B)?", value.strip(), re.IGNORECASE)
        if match is None or float(match[1]) == 0:
            self.fail(f"expected a size such as 512G or 1.5T, got {value!r}", param, ctx)
        return int(float(match[1]) * UNITS[match[2].upper()])


POSITIVE = click.FloatRange(min=0, min_open=True, max=1e9)


@click.command("plan", epilog=EPILOG, short_help="Show what a model would take, and at most give.")
@options.model_argument
@click.option("--dram", type=MemorySize(), metavar="SIZE", help="RAM, such as 512G [default: what is free].")
@click.option(
    "-c",
    "--ctx-size",
    "--cache_lens",
    "cache_lens",
    type=click.IntRange(1, 1 << 31),
    metavar="N",
    help="Tokens the KV cache holds [default: the model's context, at most 32768].",
)
@options.cpu_infer_option
@click.option(
    "--cpu-format", type=click.Choice(CPU_FORMATS), help="Format of the routed experts [default: int8]."
)
@click.option(
    "--gpu-format", type=click.Choice(("int4", "int8", "bf16")), help="Format of the rest [default: int4]."
)
@options.numa_option
@click.option("--bandwidth", type=POSITIVE, metavar="GB/s", help="Memory bandwidth [default: measured].")
@click.option(
    "--tops", type=POSITIVE, metavar="N", help="10^12 operations per second of the CPU [default: measured]."
)
@click.option(
    "--disk", type=POSITIVE, default=DEFAULT_DISK_GB_S, show_default=True, metavar="GB/s", help="Disk speed."
)
@options.json_option
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Show disk, RAM, load time and upper bounds of speed for MODEL on this machine or one described.

    MODEL is a bundle, a checkpoint directory (a config.json alone is enough), a GGUF file, or a hub id in the
    local cache. Only headers and config.json are read. Exit 4, with the nearest plan that fits, when RAM is
    too small.
    """
    model = options.pick_model(given.pop("model_argument"), given.pop("model_option"), ctx)
    _run(model, **given)


def _run(
    model: str,
    dram: int | None,
    cache_lens: int | None,
    cpu_infer: int | None,
    cpu_format: str | None,
    gpu_format: str | None,
    numa: str,
    bandwidth: float | None,
    tops: float | None,
    disk: float,
    as_json: bool,
) -> None:
    from kttools.plan.choice import Choice, open_subject, ram
    from kttools.plan.memory import default_cache_len
    from kttools.plan.report import Report, render, to_dict
    from kttools.plan.speed import speed
    from kttools.quantize.recipe import DEFAULT_CPU_FORMAT, DEFAULT_GPU_FORMAT
    from kttools_runtime.env import default_threads

    path = resolve_model(model, may_fetch=False)
    subject = open_subject(path)
    for line in subject.notices:
        options.notice(line)
    if not subject.is_bundle:
        cpu_format, gpu_format = cpu_format or DEFAULT_CPU_FORMAT, gpu_format or DEFAULT_GPU_FORMAT
    threads = default_threads() if cpu_infer is None else cpu_infer
    choice = Choice(cpu_format, gpu_format, cache_lens or 1, numa, threads)
    layout = subject.layout(choice)
    choice = Choice(cpu_format, gpu_format, cache_lens or default_cache_len(layout.config), numa, threads)
    ceilings = _ceilings(bandwidth, tops, choice, layout.compute_format)
    report = Report(
        model=model,
        path=path,
        is_bundle=subject.is_bundle,
        choice=choice,
        layout=layout,
        ram=ram(subject, choice),
        speed=speed(layout, choice.cache_len, ceilings),
        ram_limit_bytes=_available() if dram is None else dram,
        is_limit_given=dram is not None,
        disk_bytes_s=disk * 1e9,
    )
    click.echo(json.dumps(to_dict(report), indent=1) if as_json else render(report))
    if not report.fits:
        raise ResourceError(_too_small(subject, report))


def _available() -> int:
    """RAM the kernel can give without swapping, at most a container's limit."""
    import psutil

    from kttools.doctor import cgroup_memory

    available = int(psutil.virtual_memory().available)
    limit = cgroup_memory(Path("/"))
    return available if limit is None else min(available, limit)


def _ceilings(bandwidth: float | None, tops: float | None, choice: Any, compute_format: str) -> Any:
    """As given; what is not given is measured."""
    from kttools.bench.roofline import Ceilings
    from kttools.plan.speed import measure

    if bandwidth is not None and tops is not None:
        return Ceilings(0.0, bandwidth * 1e9, tops * 1e12)
    found = measure(choice.threads, choice.numa, compute_format)
    return Ceilings(
        found.at,
        found.bandwidth_bytes_s if bandwidth is None else bandwidth * 1e9,
        found.compute_ops_s if tops is None else tops * 1e12,
    )


def _too_small(subject: Any, report: Any) -> str:
    """The error's line: needed, there, and the nearest plan that fits."""
    from kttools.bundle.render import size
    from kttools.plan.choice import nearest_fit, ram, smallest

    what = f"not enough RAM: {size(report.ram.total)} needed, {size(report.ram_limit_bytes)} "
    what += "given" if report.is_limit_given else "available"
    fit = nearest_fit(subject, report.choice, report.ram_limit_bytes)
    if fit is None:
        return f"{what}; no plan fits, the smallest needs {size(smallest(subject, report.choice))}"
    formats = (
        "" if fit.cpu_format is None else f"--cpu-format {fit.cpu_format} --gpu-format {fit.gpu_format} "
    )
    remedy = f"{formats}--cache_lens {fit.cache_len} --numa {fit.numa}"
    return f"{what}; nearest plan that fits: {remedy} ({size(ram(subject, fit).total)})"
