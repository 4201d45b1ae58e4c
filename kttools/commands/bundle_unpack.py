"""kttools bundle unpack: archive files back into a bundle, or a part of it."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kttools import options
from kttools.progress import ByteProgress
from kttools_runtime.errors import UsageError

if TYPE_CHECKING:
    from kttools.bundle.archive import Archive, Unpacker

EPILOG = """\b
Examples:
  kttools bundle unpack model-int8.ktz -o ./model-int8
  kttools bundle unpack model-int8-00001-of-00012.ktz -o ./model-int8     and the parts beside it
  kttools bundle unpack model-int8-*.ktz -o ./low --layers 0-30
  kttools bundle unpack model-int8-*.ktz -o ./words --only 'tokenizer/*'
"""


@click.command("unpack", epilog=EPILOG, short_help="Turn archive files into a bundle.")
@click.argument("archive", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="The new bundle."
)
@click.option(
    "--layers", metavar="A-B,...", help="Packs of these layers only: a part of the bundle, which says so."
)
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Files that match only, which are no bundle then; may be repeated.",
)
@click.option(
    "--sha256",
    is_flag=True,
    help="Compare SHA-256 instead of XXH3: finds forgery, not only damage [always where it is signed].",
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads [default: all there are]."
)
@options.json_option
def command(
    archive: tuple[Path, ...],
    output: Path,
    layers: str | None,
    only: tuple[str, ...],
    sha256: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Write the bundle in ARCHIVE... to the new directory DIR.

    Every frame and every file is verified, and DIR appears when all of it is right. A run that was cut off
    goes on where it stopped when it is started again. With --layers or --only, the parts that hold
    nothing of what is wanted need not be there (the first one always must).
    """
    from kttools.bundle.archive import Archive

    with Archive(archive) as opened:
        unpacker = _unpacker(opened, output, layers, only, threads, sha256)
        with ByteProgress("unpack", is_quiet=options.settings().quiet) as progress:
            progress.start(unpacker.total_bytes)
            done = unpacker.run(progress.advance)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(done) | {"target": str(done.target)}, indent=1))
        return
    kept = f", {done.kept_frames} of {done.kept_frames + done.decoded_frames} frames were there already"
    again = kept if done.kept_frames else "" if done.decoded_frames else ", all of it was there already"
    click.echo(f"{done.target}: {done.files} files, {done.bytes} bytes, verified{again}")


def _unpacker(
    archive: "Archive",
    output: Path,
    layers: str | None,
    only: tuple[str, ...],
    threads: int | None,
    sha256: bool,
) -> "Unpacker":
    from kttools.bundle.archive import Unpacker, matching

    if layers is not None and only:
        raise UsageError("--layers and --only are both given: use one of them")
    names = [member.name for member in archive.members]
    if only:
        names = matching(archive.members, only, archive.name)
    if layers is not None:
        return _part(archive, output, layers, threads, sha256)
    return Unpacker(archive, output, names, None, threads, sha256)


def _part(archive: "Archive", output: Path, layers: str, threads: int | None, sha256: bool) -> "Unpacker":
    from kttools.bundle.archive import Unpacker
    from kttools.bundle.selection import choose, chosen_files, subset_manifest
    from kttools_runtime.manifest import MANIFEST_NAME

    selection = choose(archive.manifest, layers, None, None)
    if selection.layers is None:
        return Unpacker(archive, output, [m.name for m in archive.members], None, threads, sha256)
    names = [MANIFEST_NAME, *chosen_files(archive.manifest, selection)]
    part = {MANIFEST_NAME: subset_manifest(archive.manifest, selection)}
    return Unpacker(archive, output, names, part, threads, sha256)
