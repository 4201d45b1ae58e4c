"""kttools verify: check a bundle byte by byte."""

import dataclasses
import json
from pathlib import Path

import click

from kttools.bundle.verify import Verification, verify_bundle
from kttools.options import json_option, settings
from kttools.progress import ByteProgress
from kttools_runtime.errors import CorruptFileError


@click.command("verify", epilog="Example:  kttools verify ./deepseek-v3-int4")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Manifest, sizes and headers only; no file is read whole.")
@json_option
def command(bundle: Path, quick: bool, as_json: bool) -> None:
    """Check every byte of BUNDLE against its manifest, and every header against its model.

    All problems are listed; the exit code is 3 if there is any. Files the manifest does not list are named
    but do no harm: nothing reads them.
    """
    try:
        with ByteProgress("verify", is_quiet=settings().quiet) as progress:
            result = verify_bundle(bundle, is_quick=quick, on_start=progress.start, on_bytes=progress.advance)
    except CorruptFileError as error:
        damaged = Verification(bundle, 0, 0, quick, problems=[str(error)])
        click.echo(_as_json(damaged) if as_json else _as_text(damaged))
        raise
    click.echo(_as_json(result) if as_json else _as_text(result))
    result.raise_on_problems()


def _as_json(result: Verification) -> str:
    document = dataclasses.asdict(result) | {"bundle": str(result.bundle), "ok": not result.problems}
    return json.dumps(document, indent=1)


def _as_text(result: Verification) -> str:
    lines = [f"problem: {problem}" for problem in result.problems]
    lines += [f"not listed: {path}" for path in result.extra]
    checked = "sizes and headers" if result.is_quick else "every byte"
    verdict = f"not sound, {len(result.problems)} found" if result.problems else "sound"
    lines.append(f"{result.bundle}: {verdict}: {result.files} files, {result.bytes} bytes, {checked} checked")
    return "\n".join(lines)
