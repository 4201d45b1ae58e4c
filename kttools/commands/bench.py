"""kttools bench: the expert engine and whole models beside this machine's limits and beside peers."""

import shlex
from pathlib import Path
from typing import Any

import click

from kttools import options
from kttools_runtime.errors import UsageError

GROUP_EPILOG = """\b
Examples:
  kttools bench experts                                   int8, DeepSeek-V3 shape
  kttools bench experts --format int4 --tokens 1,512 -o json
  kttools bench model BUNDLE --llama-bench llama-bench --gguf model-q8_0.gguf
"""
DEFAULT_TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"


class Counts(click.ParamType):
    """Comma-separated whole numbers, at least `least` each, as a tuple."""

    name = "counts"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) >= self.least for part in parts):
            self.fail(
                f"expected whole numbers of at least {self.least}, separated by commas: {value!r}", param
            )
        return tuple(int(part) for part in parts)


def output_option(function: options.F) -> options.F:
    """-o/--output as `style`."""
    return click.option(
        "-o",
        "--output",
        "style",
        type=click.Choice(["md", "json", "csv"]),
        default="md",
        show_default=True,
        help="Markdown for people; JSON and CSV hold llama-bench's fields and ours.",
    )(function)


@click.group(
    epilog=GROUP_EPILOG,
    short_help="Measure the expert engine or a whole model.",
    context_settings={"token_normalize_func": options.normalise_token},
)
def command() -> None:
    """Measure the expert engine against this machine's limits, or a whole model, beside peers."""


@command.command(short_help="One MoE layer against the roofline.")
@click.option(
    "--shape", default="v3", show_default=True, metavar="v3|qwen3|HxI", help="Hidden and intermediate size."
)
@click.option(
    "--experts", "num_experts", type=click.IntRange(min=1), default=64, show_default=True, metavar="N",
    help="Experts of the layer.",
)  # fmt: skip
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="K",
    help="Experts per token.",
)
@click.option(
    "--format", "expert_format", default="int8", show_default=True, metavar="int8|int4|bf16|q4_k",
    help="Format of the experts; int4_g32, int4_g64 and int4_g128 choose the group, q4_k_q6_k what down has.",
)  # fmt: skip
@click.option(
    "--tokens", type=Counts(1), default=DEFAULT_TOKENS, show_default=True, metavar="N,N,...",
    help="Tokens per call, a row each.",
)  # fmt: skip
@options.cpu_infer_option
@click.option(
    "-r", "--repeat", type=click.IntRange(min=1), metavar="N", help="Timed calls per row [default: 21 to 5]."
)
@options.isa_option
@click.option("--peer", type=click.Choice(["kt-kernel"]), help="Measure it too, in alternation.")
@click.option("--peer-python", metavar="PATH", help="The interpreter that has the peer [default: this one].")
@click.option("--accuracy/--no-accuracy", default=True, help="Also the error against float32.")
@output_option
def experts(
    shape: str,
    num_experts: int,
    top_k: int,
    expert_format: str,
    tokens: tuple[int, ...],
    cpu_infer: int | None,
    repeat: int | None,
    isa: str | None,
    peer: str | None,
    peer_python: str | None,
    accuracy: bool,
    style: str,
) -> None:
    """Measure one MoE layer of random experts, a row per token count.

    Every call has fresh random distinct ids, so that weights come from memory. The floor of a call is the
    larger of two times: bytes of the experts it hits over the bandwidth, operations over the compute ceiling.
    Both ceilings are measured by the same threads before, between and after the rows.
    """
    import torch

    from kttools.bench.experts import Plan
    from kttools.bench.shapes import parse_shape
    from kttools_runtime.experts import ExpertEngine, pack_format

    if peer_python is not None and peer is None:
        raise UsageError("--peer-python needs --peer")
    pack_format(expert_format)
    plan = Plan(parse_shape(shape, num_experts, top_k), expert_format, tokens, repeat or 0)
    torch.set_num_threads(1)  # the engine's threads compute; torch only makes the inputs
    _experts(ExpertEngine(cpu_infer, isa), plan, peer is not None, peer_python, accuracy, style)


def _experts(engine: Any, plan: Any, has_peer: bool, python: str | None, accuracy: bool, style: str) -> None:
    from contextlib import nullcontext

    from kttools.bench import report
    from kttools.bench.accuracy import errors
    from kttools.bench.experts import run
    from kttools.bench.kt_peer import KtKernelPeer

    with KtKernelPeer(python) if has_peer else nullcontext() as peer:
        found = errors(engine, plan.shape, plan.format, peer, options.notice) if accuracy else {}
        rows = run(engine, plan, peer, options.notice)
        versions = {peer.name: peer.version} if peer else {}
        tamed = peer is not None and peer.is_tamed
    machine = report.machine()
    records = [
        {**machine, **report.expert_record(row), "relative_error": found.get(row.engine)} for row in rows
    ]
    for record in records:
        if record["engine"] in versions:
            record.update(engine_version=versions[record["engine"]], is_tamed=tamed)
    notes = _notes(engine, plan, machine, found, versions, tamed)
    share = rows[0].huge_page_share
    if share is not None:
        notes.append(f"{share:.0%} of our weights lie in huge pages.")
    click.echo(report.render(records, style, report.EXPERT_COLUMNS, notes), nl=False)


def _notes(
    engine: Any,
    plan: Any,
    machine: dict[str, Any],
    found: dict[str, float],
    versions: dict[str, str],
    tamed: bool,
) -> list[str]:
    shape = plan.shape
    sizes = (
        f"{shape.hidden_size}x{shape.moe_intermediate_size}, {shape.num_experts} experts, top-{shape.top_k}"
    )
    notes = [
        f"{machine['cpu_info']}, {engine.threads} threads, {engine.isa}, {machine['test_time']}",
        f"{plan.format}, {sizes}; copies of one random expert, each in memory of its own; medians",
        "Ceilings: measured before, between and after the rows; a call is held against the nearest in time.",
    ]
    if found:
        text = ", ".join(f"{name} {error:.4f}" for name, error in found.items())
        notes.append(f"Relative L2 error against float32, Gaussian weights: {text}.")
    for name, version in versions.items():
        how = (
            "its idle threads made to nap" if tamed else "as it comes (no C++ compiler to tame its spinning)"
        )
        notes.append(f"{name} {version}: {how}.")
    return notes


@command.command(short_help="A bundle with llama-bench's tests.")
@options.model_argument
@click.option(
    "-p", "--n-prompt", type=Counts(0), default="512,2048", show_default=True, metavar="N,N,...",
    help="Prompt tokens, a test each; 0 for none.",
)  # fmt: skip
@click.option(
    "-n", "--n-gen", type=Counts(0), default="32", show_default=True, metavar="N,N,...",
    help="Generated tokens, a test each; 0 for none.",
)  # fmt: skip
@options.cpu_infer_option
@click.option(
    "-r", "--repeat", type=click.IntRange(min=1), default=3, show_default=True, metavar="N",
    help="Timed runs per test.",
)  # fmt: skip
@options.isa_option
@options.device_options
@options.overcommit_option
@click.option("--llama-bench", metavar="PATH", help="llama.cpp's llama-bench, run in alternation on --gguf.")
@click.option("--gguf", "ggufs", multiple=True, metavar="FILE", help="A model for it; may be repeated.")
@click.option(
    "--llama-args", default="", metavar="TEXT", help='Further arguments of it, as "-lm none" (no mmap).'
)
@output_option
@click.pass_context
def model(ctx: click.Context, **given: Any) -> None:
    """Measure prompt processing (pp) and generation (tg) of a BUNDLE with random tokens like llama-bench."""
    bundle = options.pick_model(given["model_argument"], given["model_option"], ctx)
    if bool(given["llama_bench"]) != bool(given["ggufs"]):
        raise UsageError("--llama-bench and --gguf belong together")
    if given["llama_args"] and not given["ggufs"]:
        raise UsageError("--llama-args needs --llama-bench")
    _model(Path(bundle), given)


def _model(bundle: Path, given: dict[str, Any]) -> None:
    from functools import partial

    from kttools.bench import report
    from kttools.bench.llama_bench import LlamaBench
    from kttools.bench.model import run, speed_tests
    from kttools_runtime import load

    tests = speed_tests(given["n_prompt"], given["n_gen"])
    if not tests:
        raise UsageError("nothing to measure: -p and -n are both 0")
    more = tuple(shlex.split(given["llama_args"]))
    peers = [LlamaBench(Path(given["llama_bench"]), Path(file), more) for file in given["ggufs"]]
    opened = partial(
        load,
        bundle,
        threads=given["cpu_infer"],
        isa=given["isa"],
        check_memory=not given["overcommit"],
        **options.device_arguments(given),
        on_plan=lambda plan: options.notice(plan.line()),
    )
    records = run(bundle, tests, given["repeat"], peers, opened, options.notice)
    machine = report.machine()
    records = [{**machine, **record} for record in records]
    notes = [f"{machine['cpu_info']}, {machine['test_time']}; {given['repeat']} runs per test, mean tok/s"]
    if more:
        notes.append(f"llama-bench {' '.join(more)}")
    click.echo(report.render(records, given["style"], report.MODEL_COLUMNS, notes), nl=False)


for _command in command.commands.values():
    options.adopt(_command)
