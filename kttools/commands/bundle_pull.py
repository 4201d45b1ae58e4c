"""kttools bundle pull: a bundle or checkpoint from the hub."""

import json
from pathlib import Path

import click

from kttools import options
from kttools.progress import ByteProgress

EPILOG = """\b
Examples:
  kttools bundle pull org/model-int8                    into the hub cache; then: kttools chat org/model-int8
  kttools bundle pull org/model-int8 -o ./model-int8
"""


@click.command("pull", epilog=EPILOG, short_help="Fetch a bundle from the hub.")
@click.argument("repo_id", metavar="ORG/NAME")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The directory to write [default: the hub cache, HF_HOME].",
)
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit [default: main].")
@click.option("--dry-run", is_flag=True, help="Print what would be fetched and stop.")
@click.option("--force", is_flag=True, help="Replace another bundle in DIR, or write beside other files.")
@options.json_option
def command(
    repo_id: str, output: Path | None, revision: str | None, dry_run: bool, force: bool, as_json: bool
) -> None:
    """Fetch what is missing of ORG/NAME; every file is verified before it gets its name.

    An interrupted pull goes on where it stopped when it is started again. HF_TOKEN, HF_ENDPOINT and
    HF_HUB_OFFLINE are honoured.
    """
    from kttools.bundle.hub.cache import cache_puller, note_revision
    from kttools.bundle.hub.client import Hub
    from kttools.bundle.hub.pull import Puller

    if output is None:
        puller = cache_puller(repo_id, revision)
    else:
        puller = Puller(Hub(repo_id, revision), output, force)
    plan = puller.plan()
    if not as_json:
        click.echo(plan.line())
    plan.check()
    document = plan.to_dict()
    if not dry_run:
        with ByteProgress("pull", is_quiet=options.settings().quiet) as progress:
            puller.run(plan, progress.start, progress.advance)
        if output is None:
            note_revision(puller.hub)
        if not as_json:
            click.echo(f"{plan.target}: complete, {plan.inventory.count} files")
    if as_json:
        click.echo(json.dumps(document, indent=1))
