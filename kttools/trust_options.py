"""--signer, --require-signature and --trusted-keys, for every command that uses a bundle."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from .config_file import option_values
from .options import settings

F = TypeVar("F", bound=Callable[..., Any])
NAMES = ("require_signature", "signer", "trusted_keys")


def signature_options(function: F) -> F:
    """Adds the three options; the command receives `signer`, `require_signature` and `trusted_keys`."""
    function = click.option(
        "--trusted-keys",
        multiple=True,
        metavar="KEY",
        help="Key whose signature is believed, as for --signer; best kept in the user's kttools.toml.",
    )(function)
    function = click.option(
        "--require-signature/--no-require-signature",
        default=False,
        help="Refuse a bundle that no trusted key signed.",
    )(function)
    return click.option(
        "--signer",
        "--key",
        "signer",
        multiple=True,
        metavar="KEY",
        help="Refuse a bundle that this key did not sign: a .pub or allowed_signers file, or its line.",
    )(function)


def check_trust(bundle: Path, given: dict[str, Any]) -> None:
    """Takes the three options out of `given`; where they ask for a signature, checks it and all bytes."""
    required, signers, trusted = (given.pop(key) for key in NAMES)
    _check(bundle, required, signers, trusted)


def check_configured(bundle: Path) -> None:
    """What the configuration asks of a bundle, for commands without these options; others see to it."""
    context = click.get_current_context(silent=True)
    if context is not None and any(param.name == "require_signature" for param in context.command.params):
        return
    values = option_values("", {name: name for name in NAMES})
    is_required = _env_flag() if _env_flag() is not None else values.get("require_signature", False)
    if is_required:
        trusted = values.get("trusted_keys", ())
        _check(bundle, True, (), (trusted,) if isinstance(trusted, str) else trusted)


def _env_flag() -> bool | None:
    text = os.environ.get("KTTOOLS_REQUIRE_SIGNATURE")
    return None if text is None else text.lower() in ("1", "true", "yes", "on", "t", "y")


def _check(bundle: Path, is_required: bool, signers: Sequence[str], trusted: Sequence[str]) -> None:
    from .bundle.trust import TrustPolicy
    from .progress import ByteProgress

    policy = TrustPolicy(is_required, tuple(signers), tuple(trusted))
    with ByteProgress("verify", is_quiet=settings().quiet) as progress:
        policy.check_bundle(bundle, progress.start, progress.advance)
