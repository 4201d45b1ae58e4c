"""kttools bundle subset: a part of a bundle."""

import dataclasses
import json
from pathlib import Path

import click

from kttools import options
from kttools.progress import ByteProgress

EPILOG = """\b
Examples:
  kttools bundle subset ./model-int8 -o ./low --layers 0-30
  kttools bundle subset ./model-int8 -o ./first-half --node 0/2
  kttools bundle subset ./model-int8 -o ./some --layers 3-10 --experts 0-63,128
"""


@click.command("subset", epilog=EPILOG, short_help="Cut a part out of a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="The new part."
)
@click.option("--layers", metavar="A-B,...", help="Packs of these layers only.")
@click.option("--experts", metavar="A-B,...", help="These routed experts of every layer only.")
@click.option(
    "--node",
    metavar="I/N",
    help="The routed experts of node I of N, such as 0/2. Whole experts: a pack holds no part of one.",
)
@options.json_option
def command(
    bundle: Path,
    output: Path,
    layers: str | None,
    experts: str | None,
    node: str | None,
    as_json: bool,
) -> None:
    """Write the part of BUNDLE that somebody needs to the new directory DIR.

    Shards, tokenizer and tables go along whole: all but the routed experts is a few percent. The part's
    manifest names the bundle it was cut from; `kttools verify` checks it like any other. It cannot be loaded
    as a model; a part by layers can be computed with one layer at a time.
    """
    from kttools.bundle.subset import Cutter

    cutter = Cutter(bundle, output, layers, experts, node)
    with ByteProgress("subset", is_quiet=options.settings().quiet) as progress:
        progress.start(cutter.total_bytes)
        cut = cutter.run(progress.advance)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(cut) | {"target": str(cut.target)}, indent=1))
        return
    packs = f"{len(cut.layers)} packs of {cut.experts} experts"
    click.echo(f"{cut.target}: a part of {cut.of[:16]}: {packs}, {cut.files} files, {cut.bytes} bytes")
