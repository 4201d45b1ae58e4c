"""kttools plan: what a model takes and at most gives, before anything is downloaded or written."""

import json
import re
from typing import Any

import click

from kttools import options
from kttools.commands.quantize import CPU_FORMATS
from kttools_runtime.errors import HardwareError, ResourceError, UsageError

EPILOG = """\b
Examples:
  kttools plan ./DeepSeek-V3
  kttools plan ./DeepSeek-V3 --dram 512G --cpu-format int4 --bandwidth 250 --tops 50
  kttools plan deepseek-ai/DeepSeek-V3 --dram 768G --nodes 2 --vram 24G --gpu-experts auto
"""
DEFAULT_VRAM_BYTES = 24 << 30
MOST_GPUS = 16
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
    "--cpu-format",
    type=click.Choice(CPU_FORMATS),
    help="Format of the routed experts [default: as quantize].",
)
@click.option(
    "--gpu-format",
    type=click.Choice(("int4", "int8", "bf16", "q4_k")),
    help="Format of the rest [default: as quantize].",
)
@options.numa_option
@click.option("--nodes", type=click.IntRange(1, 16), metavar="N", help="Memory nodes [default: as here].")
@click.option("--vram", type=MemorySize(), metavar="SIZE", help="VRAM of each GPU that is described.")
@click.option(
    "--gpus", type=click.IntRange(0, MOST_GPUS), metavar="N", help="GPUs that are described, of --vram each."
)
@click.option(
    "--device", metavar="DEVICE", help="cpu, or GPUs of this machine (cuda:0,cuda:1) with what is free there."
)
@click.option(
    "--gpu-experts",
    metavar="auto|N|FILE",
    help="Routed experts on the GPUs: as many as fit, N per layer, or those of a list; auto:FILE and N:FILE "
    "choose, and predict, by an expert profile.",
)
@click.option(
    "--bandwidth",
    "--dram-bandwidth",
    "bandwidth",
    type=POSITIVE,
    metavar="GB/s",
    help="Memory bandwidth [default: measured].",
)
@click.option(
    "--tops", type=POSITIVE, metavar="N", help="10^12 operations per second of the CPU [default: measured]."
)
@click.option(
    "--vram-bandwidth", type=POSITIVE, metavar="GB/s", help="Of one GPU [default: 1008, an RTX 4090]."
)
@click.option(
    "--gpu-tops", type=POSITIVE, metavar="N", help="10^12 operations per second of a GPU [default: 165]."
)
@click.option(
    "--disk", type=POSITIVE, default=DEFAULT_DISK_GB_S, show_default=True, metavar="GB/s", help="Disk speed."
)
@click.option("--measure", is_flag=True, help="Measure again what an earlier plan or bench remembered.")
@options.json_option
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Show disk, RAM, VRAM, load time and upper bounds of speed for MODEL on this machine or one described.

    MODEL is a bundle, a checkpoint directory (a config.json alone is enough), a GGUF file, or a hub id, whose
    config.json alone is fetched. Only headers and config.json are read. Exit 4, with the nearest plan that
    fits, when RAM or VRAM is too small.
    """
    model = options.pick_model(given.pop("model_argument"), given.pop("model_option"), ctx)
    _run(model, given)


def _run(model: str, given: dict[str, Any]) -> None:
    from kttools.plan.hub_config import model_path
    from kttools.plan.memory import libraries_bytes
    from kttools.plan.report import render, to_dict

    libraries_bytes()  # before a measurement takes memory of its own
    report, subject = _report(model, model_path(model), given)
    for line in subject.notices:
        options.notice(line)
    click.echo(json.dumps(to_dict(report), indent=1) if given["as_json"] else render(report))
    if not report.fits:
        raise ResourceError(_too_small(subject, report))


def _report(model: str, path: Any, given: dict[str, Any]) -> Any:
    """(what the plan says, its subject)."""
    from dataclasses import replace

    from kttools.model_source import HUB_ID
    from kttools.plan.choice import Choice, needs_of, open_subject
    from kttools.plan.memory import default_cache_len
    from kttools.plan.report import Report
    from kttools.plan.speed import speed
    from kttools_runtime.env import default_threads

    subject = open_subject(path)
    cpu_format, gpu_format = given["cpu_format"], given["gpu_format"]
    if not subject.is_bundle:
        cpu_format = cpu_format or subject.default_cpu_format
        gpu_format = gpu_format or subject.default_gpu_format
    threads = given["cpu_infer"] or default_threads()
    choice = Choice(cpu_format, gpu_format, 1, given["numa"], threads)
    layout = subject.layout(choice)
    machine, names, vram_source = _machine(given)
    choice = replace(
        choice,
        cache_len=given["cache_lens"] or default_cache_len(layout.config),
        gpu_experts=_gpu_experts(given["gpu_experts"], bool(names), layout.config),
    )
    need = needs_of(subject, choice, machine)
    cpu = _cpu_ceilings(given, choice, layout.compute_format)
    gpu = _gpu_ceilings(given) if names else None
    on_gpu = gpu.ceilings if gpu else None
    hot = speed(layout, choice.cache_len, cpu.ceilings, on_gpu, need.most_share) if need.most_hot else None
    is_hub_id = bool(HUB_ID.fullmatch(model)) and path.name != model.rpartition("/")[2]
    return (
        Report(
            model=model,
            name=model.rpartition("/")[2] if is_hub_id else path.name.removesuffix(".gguf"),
            path=path,
            is_bundle=subject.is_bundle,
            choice=choice,
            layout=layout,
            machine=machine,
            device_names=names,
            needs=need,
            speed=speed(layout, choice.cache_len, cpu.ceilings, on_gpu, need.hot_share),
            hot_speed=hot,
            cpu=cpu,
            gpu=gpu,
            ram_source="available" if given["dram"] is None else "given",
            vram_source=vram_source,
            disk_bytes_s=given["disk"] * 1e9,
        ),
        subject,
    )


def _machine(given: dict[str, Any]) -> tuple[Any, tuple[str, ...], str]:
    """What there is: (machine, names of its GPUs, where their VRAM is from)."""
    from kttools.plan.memory import Machine
    from kttools_runtime.memory import available_bytes

    device, is_described = given["device"], given["vram"] is not None or bool(given["gpus"])
    if device not in (None, "cpu"):
        if is_described:
            raise UsageError("--device is of this machine; --vram and --gpus describe another: leave one out")
        vram, names, source = *_gpus_here(device), "free"
    else:
        count = 0 if device == "cpu" else given["gpus"] if given["gpus"] is not None else int(is_described)
        vram = (given["vram"] or DEFAULT_VRAM_BYTES,) * count
        names, source = tuple(f"cuda:{index}" for index in range(count)), "given"
        source = source if given["vram"] else "assumed"
    ram = available_bytes() if given["dram"] is None else given["dram"]
    return Machine(ram, vram, given["nodes"] or 0), names, source


def _gpus_here(device: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """VRAM that is free, and names. Raises UsageError, HardwareError."""
    import torch

    names = tuple(part.strip() if ":" in part else f"{part.strip()}:0" for part in device.split(","))
    if any(not re.fullmatch(r"cuda:\d{1,3}", name) for name in names) or len(set(names)) != len(names):
        raise UsageError(f"unknown device {device!r}: expected cpu, cuda:0, or cuda:0,cuda:1")
    found = torch.cuda.device_count()
    if any(int(name[5:]) >= found for name in names):
        raise HardwareError(f"device {device}: torch sees {found} CUDA devices; describe one: --vram 24G")
    return tuple(int(torch.cuda.mem_get_info(int(name[5:]))[0]) for name in names), names


def _gpu_experts(asked: str | None, has_gpu: bool, config: Any) -> Any:
    """As a load reads it. Raises UsageError, InvalidInputError."""
    from kttools_runtime.hybrid.hot_request import read_request

    if asked is None:
        return None
    if not has_gpu:
        raise UsageError("--gpu-experts needs a GPU: --vram, --gpus or --device")
    return read_request(asked, config)


def _cpu_ceilings(given: dict[str, Any], choice: Any, compute_format: str) -> Any:
    """As given; what is not given is remembered, or measured and remembered."""
    from kttools.bench.roofline import Ceilings
    from kttools.plan.ceilings import Sourced, machine_key, merged, recall, remember
    from kttools.plan.speed import measure

    bandwidth, tops = given["bandwidth"], given["tops"]
    if bandwidth is not None and tops is not None:
        return merged(bandwidth, tops, Sourced(Ceilings(0.0, 0.0, 0.0), "", ""))
    key = machine_key(choice.threads, choice.numa, compute_format)
    found = None if given["measure"] else recall(key)
    if found is None:
        fresh = measure(choice.threads, choice.numa, compute_format)
        remember(key, fresh)
        found = Sourced(fresh, "measured now", "measured now")
    return merged(bandwidth, tops, found)


def _gpu_ceilings(given: dict[str, Any]) -> Any:
    from kttools.plan.ceilings import ASSUMED_GPU, Sourced, merged

    assumed = Sourced(ASSUMED_GPU, "assumed", "assumed")
    return merged(given["vram_bandwidth"], given["gpu_tops"], assumed)


def _too_small(subject: Any, report: Any) -> str:
    """The error's line: needed, there, and the nearest plan that fits."""
    from kttools.bundle.render import size
    from kttools.plan.choice import nearest_fit, needs_of, smallest

    what = "; ".join(_shortages(report))
    found = nearest_fit(subject, report.choice, report.machine)
    if found is None:
        ram, vram = smallest(subject, report.choice, report.machine)
        least = f"{size(ram)} of RAM" + (f" and {size(vram)} of VRAM" if vram else "")
        return f"{what}; no plan fits, the smallest needs {least}"
    fit, machine = found
    formats = (
        "" if fit.cpu_format is None else f"--cpu-format {fit.cpu_format} --gpu-format {fit.gpu_format} "
    )
    remedy = f"{formats}--cache_lens {fit.cache_len} --numa {fit.numa}"
    if fit.gpu_experts is not None:
        remedy += f" --gpu-experts {fit.gpu_experts.text}"
    if len(machine.vram) != len(report.machine.vram):
        remedy += f" --gpus {len(machine.vram)} --vram {machine.vram[0] >> 20}M"
    need = needs_of(subject, fit, machine)
    total = size(need.ram_total) + "".join(f", {size(device.total)} of VRAM" for device in need.devices)
    return f"{what}; nearest plan that fits: {remedy} ({total})"


def _shortages(report: Any) -> list[str]:
    from kttools.bundle.render import size

    found = []
    if report.needs.ram_total > report.machine.ram_bytes:
        limit = f"{size(report.machine.ram_bytes)} {report.ram_source}"
        found.append(f"not enough RAM: {size(report.needs.ram_total)} needed, {limit}")
    for name, device, limit in zip(
        report.device_names, report.needs.devices, report.machine.vram, strict=True
    ):
        if device.total > limit:
            found.append(f"not enough VRAM on {name}: {size(device.total)} needed, {size(limit)}")
    return found
