"""kttools bundle pack: a bundle as archive files."""

import json
import re
from pathlib import Path
from typing import Any

import click

from kttools import options
from kttools.progress import ByteProgress

EPILOG = """\b
Examples:
  kttools bundle pack ./model-int8 -o model-int8.ktz
  kttools bundle pack ./model-int8 -o model-int8.ktz --split-size 4G      model-int8-00001-of-0000N.ktz
"""
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Size(click.ParamType):
    """4G, 700M, 1048576: binary units."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,15})([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE | re.ASCII)
        if match is None or int(match[1]) == 0:
            self.fail(f"expected a size such as 4G or 700M, got {value!r}", param, ctx)
        return int(match[1]) * UNITS[match[2].upper()]


@click.command("pack", epilog=EPILOG, short_help="Turn a bundle into archive files.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="NAME.ktz", help="The archive."
)
@click.option("--split-size", type=Size(), metavar="SIZE", help="Several files, each at most so large: 4G.")
@click.option(
    "--level",
    type=click.IntRange(0, 19),
    default=1,
    show_default=True,
    metavar="N",
    help="zstd level; 0 stores. Higher ones find next to nothing in quantised weights.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads [default: all there are]."
)
@click.option("--force", is_flag=True, help="Replace an archive of this name.")
@options.json_option
def command(
    bundle: Path,
    output: Path,
    split_size: int | None,
    level: int,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write BUNDLE as one archive file, or as several with --split-size.

    The archive is a tar in zstd frames, so `cat NAME*.ktz | zstd -d | tar x` reads it, too; `bundle unpack`
    reads it in parallel, verified, and parts of it alone. The same bundle gives the same bytes, with any
    number of threads. Every file is held against the manifest on the way.
    """
    from kttools.bundle.archive import Packer

    packer = Packer(bundle, output, split_bytes=split_size, level=level, threads=threads, is_forced=force)
    with ByteProgress("pack", is_quiet=options.settings().quiet) as progress:
        progress.start(packer.total_bytes)
        packed = packer.run(progress.advance)
    if as_json:
        document = {
            "archive": [str(path) for path in packed.parts],
            "bytes": packed.bytes,
            "packed_bytes": packed.packed_bytes,
            "frames": packed.frames,
        }
        click.echo(json.dumps(document, indent=1))
        return
    ratio = packed.packed_bytes / max(packed.bytes, 1)
    count = f"{len(packed.parts)} parts" if len(packed.parts) > 1 else "1 file"
    click.echo(f"{packed.parts[0]}: {count}, {packed.packed_bytes} bytes, {ratio:.1%} of {packed.bytes}")
