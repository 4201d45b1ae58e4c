"""kttools verify: check a bundle byte by byte, check who signed it, mend it from another copy."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from kttools.bundle.trust import TrustPolicy
from kttools.bundle.verify import Verification, verify_bundle
from kttools.options import json_option, settings
from kttools.progress import ByteProgress
from kttools.trust_options import signature_options
from kttools_runtime.errors import CorruptFileError, InvalidInputError, UsageError

EPILOG = """\b
Examples:
  kttools verify ./deepseek-v3-int4
  kttools verify ./deepseek-v3-int4 --fetch /mnt/backup/deepseek-v3-int4
  kttools verify ./deepseek-v3-int4 --fetch https://example.org/deepseek-v3-int4
  kttools verify ./deepseek-v3-int4 --signer alice.pub
"""


@click.command("verify", epilog=EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Manifest, sizes and headers only; no file is read whole.")
@click.option(
    "--sha256", is_flag=True, help="Compare SHA-256 instead of XXH3: finds forgery, not only damage."
)
@click.option(
    "--threads",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Files read at a time [default: CPUs, up to 8].",
)
@click.option(
    "--fetch",
    metavar="SOURCE",
    help="Get broken files again: a directory with the same bundle, the http(s) URL of one, or a hub id.",
)
@signature_options
@json_option
def command(bundle: Path, as_json: bool, **given: Any) -> None:
    """Check every byte of BUNDLE against its manifest, and every header against its model.

    All problems are listed; the exit code is 3 if there is any. Files the manifest does not list are named
    but do no harm: nothing reads them. With --fetch, broken files come again from SOURCE; each is compared
    with the manifest before it takes its place.
    """
    if given["quick"] and (given["fetch"] or given["sha256"]):
        raise UsageError("--quick reads no file whole: it excludes --sha256 and --fetch")
    try:
        result = _verify(bundle, given)
    except InvalidInputError as error:
        damaged = Verification(bundle, 0, 0, None, problems=[str(error)])
        if isinstance(error, CorruptFileError):
            click.echo(_as_json(damaged) if as_json else _as_text(damaged))
        raise
    click.echo(_as_json(result) if as_json else _as_text(result))
    result.raise_on_problems()


def _verify(bundle: Path, given: dict[str, Any]) -> Verification:
    policy = TrustPolicy(given["require_signature"], given["signer"], given["trusted_keys"])
    taken = _take_manifest(bundle, given["fetch"], policy) if given["fetch"] else []
    signer = policy.check_manifest(bundle)
    is_exchange = given["sha256"] or signer is not None
    checks = {"hash": "sha256" if is_exchange else "xxh3_128", "threads": given["threads"]}
    result = _run(bundle, is_quick=given["quick"], **checks)
    if result.broken and given["fetch"]:
        result = _repair(bundle, result, given["fetch"])
    repaired = [*taken, *result.repaired]
    return dataclasses.replace(result, repaired=repaired, signer=str(signer) if signer else None)


def _run(bundle: Path, **checks: Any) -> Verification:
    with ByteProgress("verify", is_quiet=settings().quiet) as progress:
        return verify_bundle(bundle, on_start=progress.start, on_bytes=progress.advance, **checks)


def _take_manifest(bundle: Path, source: str, policy: TrustPolicy) -> list[str]:
    from kttools.bundle.repair import repair_manifest
    from kttools.bundle.suppliers import open_supplier

    return repair_manifest(bundle, open_supplier(source), policy.needs_signature)


def _repair(bundle: Path, result: Verification, source: str) -> Verification:
    """The result with what is still wrong; the new files are verified, the others were."""
    from kttools.bundle.repair import repair_files
    from kttools.bundle.suppliers import open_supplier

    with ByteProgress("fetch", is_quiet=settings().quiet) as progress:
        done = repair_files(bundle, result.broken, open_supplier(source), progress.start, progress.advance)
    again = verify_bundle(bundle, is_quick=True)
    return dataclasses.replace(again, hash=result.hash, repaired=done)


def _as_json(result: Verification) -> str:
    facts = {"bundle": str(result.bundle), "ok": not result.problems, "is_quick": result.is_quick}
    return json.dumps(dataclasses.asdict(result) | facts, indent=1)


def _as_text(result: Verification) -> str:
    lines = [f"problem: {problem}" for problem in result.problems]
    lines += [f"fetched again: {path}" for path in result.repaired]
    lines += [f"not listed: {path}" for path in result.extra]
    if result.signer:
        lines.append(f"signed by {result.signer}")
    checked = f"every byte checked ({result.hash})" if result.hash else "sizes and headers checked"
    verdict = f"not sound, {len(result.problems)} found" if result.problems else "sound"
    lines.append(f"{result.bundle}: {verdict}: {result.files} files, {result.bytes} bytes, {checked}")
    return "\n".join(lines)
