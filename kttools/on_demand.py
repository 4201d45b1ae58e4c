"""A model named by its hub id and not here yet: the plan is shown, the user is asked, the model is pulled."""

import sys
from pathlib import Path

import click

from kttools_runtime.errors import DownloadError

from .options import notice, settings
from .progress import ByteProgress


def pull_model(repo_id: str) -> Path:
    """The snapshot in the hub's cache, pulled with the user's consent: --yes, or an answer on a terminal.

    Raises DownloadError without consent, and what a pull raises.
    """
    from .bundle.hub.cache import cache_puller, note_revision

    puller = cache_puller(repo_id)
    plan = puller.plan()
    plan.check()
    if not plan.is_complete:
        _ask(plan.line(), repo_id)
    with ByteProgress("pull", is_quiet=settings().quiet) as progress:
        puller.run(plan, progress.start, progress.advance)
    note_revision(puller.hub)
    return puller.target


def _ask(plan: str, repo_id: str) -> None:
    """Returns when the user agrees. Raises DownloadError when not, or when there is nobody to ask."""
    if settings().yes:
        notice(plan)
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise DownloadError(
            f"{plan}; nothing was fetched: say --yes, or fetch it first: kttools bundle pull {repo_id}"
        )
    click.echo(plan, err=True)
    if not click.confirm("Fetch it now?", err=True):
        raise DownloadError(f"{repo_id}: not fetched")
