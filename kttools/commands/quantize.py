"""kttools quantize: a checkpoint into a bundle."""

import json
from pathlib import Path
from typing import Any

import click

from kttools import options
from kttools.model_source import resolve_model
from kttools.progress import ByteProgress

EPILOG = """\b
Examples:
  kttools quantize ./DeepSeek-V3 -o ./deepseek-v3-int8
  kttools quantize ./DeepSeek-V3 -o ./deepseek-v3-int4 --cpu-format int4 --dry-run
  kttools quantize DeepSeek-V3-Q8_0-00001-of-00015.gguf -o ./deepseek-v3-int8
  kttools quantize DeepSeek-V3-Q4_K_M-00001-of-00009.gguf -o ./deepseek-v3-q4k
"""
CPU_FORMATS = ("int8", "bf16", "int4", "int4_g32", "int4_g64", "int4_g128", "q4_k")


@click.command("quantize", epilog=EPILOG, short_help="Turn a checkpoint into a bundle.")
@options.model_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="BUNDLE",
    help="The directory to write.",
)
@click.option(
    "--cpu-format",
    type=click.Choice(CPU_FORMATS),
    help="Format of the routed experts; q4_k keeps a GGUF file's blocks (Q4_K, Q5_K, Q6_K, Q8_0) as they are "
    "[default: int8; q4_k for a GGUF file of K-quants].",
)
@click.option(
    "--gpu-format",
    type=click.Choice(("int4", "int8", "bf16", "q4_k")),
    help="Format of attention, dense and shared MLPs, head; with int4, head and kv projections are int8; "
    "q4_k keeps a GGUF file's blocks, as above [default: int4; q4_k for a GGUF file of K-quants].",
)
@click.option(
    "--group-size",
    type=click.Choice(("128", "64", "32")),
    default="128",
    show_default=True,
    help="Inputs per scale of --gpu-format int4.",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Formats of single experts and linears: lines PATTERN = FORMAT; see docs/recipes.md.",
)
@click.option(
    "--workers", type=click.IntRange(1, 1024), default=1, show_default=True, help="Experts in work at a time."
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--force", is_flag=True, help="Replace a bundle, or start an unfinished one over.")
@options.json_option
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Turn the checkpoint MODEL into a bundle: expert packs, shards, tokenizer, manifest and error report.

    The plan (bytes to read and write, RAM) is printed first. A run that was cut off continues where it
    stopped when it is started again with the same source and options.
    """
    model = options.pick_model(given.pop("model_argument"), given.pop("model_option"), ctx, True)
    _run(model, options.weights_path(ctx, model), **given)


def _run(
    model: str,
    gguf_path: str | None,
    output: Path,
    cpu_format: str | None,
    gpu_format: str | None,
    group_size: str,
    recipe: Path | None,
    workers: int,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    from kttools.families import open_model
    from kttools.quantize.blocks import default_cpu_format, default_gpu_format
    from kttools.quantize.plan import make_plan, render_plan
    from kttools.quantize.recipe import make_recipe
    from kttools.quantize.writer import Quantizer

    source = open_model(resolve_model(model), resolve_model(gguf_path) if gguf_path else None)
    for line in source.notices:
        options.notice(line)
    cpu_format = cpu_format or default_cpu_format(source)
    gpu_format = gpu_format or default_gpu_format(source)
    plan = make_plan(source, make_recipe(cpu_format, gpu_format, int(group_size), recipe), workers)
    quantizer = Quantizer(plan, output, force)
    resources = quantizer.resources()
    if not as_json:
        click.echo(render_plan(plan, resources))
    resources.check(plan, output)
    document = {"bundle": str(output), "plan": plan.to_dict() | _available(resources)}
    if not dry_run:
        with ByteProgress("quantize", is_quiet=options.settings().quiet) as progress:
            outcome = quantizer.run(progress.start, progress.advance)
        document["result"] = _result(outcome)
        if not as_json:
            click.echo(_as_text(outcome, output))
    if as_json:
        click.echo(json.dumps(document, indent=1))


def _available(resources: Any) -> dict[str, int]:
    return {
        "disk_free_bytes": resources.disk_free_bytes,
        "ram_available_bytes": resources.ram_available_bytes,
        "finished_bytes": resources.finished_bytes,
    }


def _result(outcome: Any) -> dict[str, Any]:
    from kttools.quantize.report import by_role, worst

    return {
        "seconds": round(outcome.seconds, 3),
        "written_files": outcome.written_files,
        "kept_files": outcome.kept_files,
        "bundle_bytes": sum(entry.bytes for entry in outcome.manifest.files.values()),
        "manifest_sha256": outcome.manifest.manifest_sha256,
        "roles": [role.to_dict() for role in by_role(outcome.errors)],
        "worst": [error.to_dict() for error in worst(outcome.errors)],
    }


def _as_text(outcome: Any, output: Path) -> str:
    from kttools.bundle.render import size
    from kttools.quantize.report import summary

    total = sum(entry.bytes for entry in outcome.manifest.files.values())
    kept = f", {outcome.kept_files} files kept from an earlier run" if outcome.kept_files else ""
    lines = [summary(outcome.errors), f"{output}: {size(total)} in {outcome.seconds:.1f} s{kept}"]
    return "\n".join(lines)
