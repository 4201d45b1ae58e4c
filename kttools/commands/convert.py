"""kttools convert: a checkpoint or a bundle into GGUF."""

import json
import re
from pathlib import Path
from typing import Any

import click

from kttools import options
from kttools.progress import ByteProgress
from kttools_runtime.errors import UsageError

EPILOG = """\b
Examples:
  kttools convert ./DeepSeek-V3 -o deepseek-v3-bf16.gguf
  kttools convert ./deepseek-v3-int4 -o deepseek-v3-q8_0.gguf --type q8_0 --split-max-size 50G
"""
TYPES = ("bf16", "f16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@click.command("convert", epilog=EPILOG, short_help="Write a checkpoint or a bundle as GGUF.")
@options.model_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE.gguf",
    help="The file to write; splits get -00001-of-0000N before the suffix.",
)
@click.option(
    "--type",
    "type_name",
    type=click.Choice(TYPES),
    default="bf16",
    show_default=True,
    help="Type of the matrices; norms and router are f32, embedding and head at least q8_0.",
)
@click.option(
    "--split-max-size", metavar="N(M|G)", help="Write splits with at most this many bytes of tensors."
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@options.json_option
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Write MODEL (a checkpoint, GGUF or a bundle, then dequantised) as GGUF files that llama.cpp loads.

    A file gets its name when it is complete. One expert is in memory at a time.
    """
    model = options.pick_model(given.pop("model_argument"), given.pop("model_option"), ctx)
    _run(model, **given)


def _run(
    model: str,
    output: Path,
    type_name: str,
    split_max_size: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    from kttools.bundle.render import size
    from kttools.gguf_out.plan import make_plan
    from kttools.gguf_out.writer import check_target, write
    from kttools.model_source import open_source

    if output.suffix != ".gguf":
        raise UsageError(f"{output}: the name must end in .gguf")
    source = open_source(model)
    for line in source.notices:
        options.notice(line)
    plan = make_plan(source, output, type_name, _bytes(split_max_size))
    check_target(plan, force)
    document = {
        "source": str(source.path),
        "type": type_name,
        "tensors": plan.tensors,
        "bytes": plan.bytes,
        "files": [{"path": str(file.path), "bytes": file.bytes} for file in plan.files],
    }
    if not as_json:
        click.echo(f"{source.path}: {plan.tensors} tensors as {type_name}, {size(plan.bytes)}")
    if not dry_run:
        with ByteProgress("convert", is_quiet=options.settings().quiet) as progress:
            progress.start(plan.bytes)
            write(plan, progress.advance)
    if as_json:
        click.echo(json.dumps(document, indent=1))
    else:
        click.echo("\n".join(str(file.path) for file in plan.files))


def _bytes(text: str | None) -> int | None:
    """500M, 50G or a plain number, as llama.cpp takes it. Raises a usage error."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15})([KMG]?)", text)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{text!r} is not a size such as 500M or 50G", param_hint="--split-max-size")
    return int(match[1]) * UNITS[match[2]]
