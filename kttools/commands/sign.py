"""kttools sign: vouch for a bundle."""

import os
from pathlib import Path

import click

from kttools.bundle.signing import read_private_key, sign_manifest
from kttools.bundle.verify import verify_bundle
from kttools_runtime.errors import UsageError
from kttools_runtime.manifest import SIGNATURE_NAME

EPILOG = """\b
Examples:
  ssh-keygen -t ed25519 -f bundle-key -N ""      make a key once
  kttools sign ./model-int8 --key bundle-key
  kttools verify ./model-int8 --signer bundle-key.pub

The same signature without kttools:
  ssh-keygen -Y sign -n kttools-bundle -f bundle-key ./model-int8/bundle.json
"""


@click.command(epilog=EPILOG, short_help="Sign a bundle's manifest.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key",
    "key_file",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Private ed25519 key, OpenSSH or PEM; KTTOOLS_KEY_PASSWORD or a prompt opens an encrypted one.",
)
@click.option("--force", is_flag=True, help="Replace a signature that is there.")
def command(bundle: Path, key_file: Path, force: bool) -> None:
    """Sign BUNDLE: write bundle.json.sig, by which others can tell that you made it.

    The manifest names every file with its SHA-256, so one signature stands for all of them. Sizes and headers
    are checked first; run `kttools verify` before you vouch for the bytes.
    """
    verify_bundle(bundle, is_quick=True).raise_on_problems()
    if os.path.lexists(bundle / SIGNATURE_NAME) and not force:
        raise UsageError(f"{bundle / SIGNATURE_NAME}: exists already; --force replaces it")
    password = os.environ.get("KTTOOLS_KEY_PASSWORD")
    try:
        key = read_private_key(key_file, password.encode() if password else None)
    except UsageError as error:
        if password or "is encrypted" not in str(error) or not os.isatty(0):
            raise
        key = read_private_key(key_file, click.prompt("password", hide_input=True, err=True).encode())
    click.echo(f"{bundle / SIGNATURE_NAME}: signed by {sign_manifest(bundle, key)}")
