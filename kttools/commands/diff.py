"""kttools diff: two models compared tensor by tensor."""

import json
import math

import click

from kttools import options
from kttools.progress import ByteProgress
from kttools_runtime.errors import QualityGateError, UsageError

EPILOG = """\b
Examples:
  kttools diff ./DeepSeek-V3 ./deepseek-v3-int4
  kttools diff model.gguf ./bundle --json --max-relative-rms 0.01
"""


@click.command("diff", epilog=EPILOG, short_help="Compare two models tensor by tensor.")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--worst", type=click.IntRange(0), default=8, show_default=True, help="Tensors to list.")
@click.option(
    "--max-relative-rms",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Exit with 6 when a tensor differs by more, or is only in one of them.",
)
@options.json_option
def command(first: str, second: str, worst: int, max_relative_rms: float | None, as_json: bool) -> None:
    """Compare A (the original) with B: checkpoints, GGUF files or bundles, dequantised as they are read.

    For every tensor: the relative RMS of the difference, its largest value and the cosine. Experts are
    compared one by one; names are those of a bundle.
    """
    if max_relative_rms is not None and not math.isfinite(max_relative_rms):
        raise UsageError(f"--max-relative-rms must be a finite number, got {max_relative_rms}")
    from kttools.eval.diff import compare, work_bytes
    from kttools.eval.diff_text import as_text
    from kttools.model_source import open_source

    a, b = open_source(first), open_source(second)
    with ByteProgress("diff", is_quiet=options.settings().quiet) as progress:
        progress.start(work_bytes(a))
        result = compare(a, b, progress.advance)
    if as_json:
        click.echo(json.dumps({"a": first, "b": second} | result.to_dict(worst), indent=1))
    else:
        click.echo(as_text(result, worst))
    if max_relative_rms is None:
        return
    if result.missing:
        raise QualityGateError(
            f"{len(result.missing)} tensors could not be compared, first {result.missing[0]}"
        )
    if not result.worst_relative_rms <= max_relative_rms:
        raise QualityGateError(
            f"relative RMS {result.worst_relative_rms:g} is above {max_relative_rms:g} (--max-relative-rms)"
        )
