"""kttools inspect: what is in a file or directory of ours, or a checkpoint."""

import json
from pathlib import Path

import click

from kttools.bundle.inspect import inspect_path
from kttools.bundle.render import render
from kttools.options import json_option


@click.command("inspect", epilog="Example:  kttools inspect ./DeepSeek-V3 --json")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def command(path: Path, as_json: bool) -> None:
    """Show what is in PATH: a bundle, a checkpoint directory, a .safetensors or .gguf file or an expert pack.

    Only headers are read and checked; use `kttools verify` to check a bundle's data.
    """
    report = inspect_path(path)
    click.echo(json.dumps(report, indent=1) if as_json else render(report))
