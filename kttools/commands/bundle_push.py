"""kttools bundle push: a bundle to the hub."""

import json
from pathlib import Path

import click

from kttools import options
from kttools.progress import ByteProgress


@click.command(
    "push",
    epilog="Example:  kttools bundle push ./model-int8 org/model-int8 --private",
    short_help="Send a bundle to the hub.",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="ORG/NAME")
@click.option("--revision", metavar="BRANCH", help="The branch to commit to [default: main].")
@click.option("--private", is_flag=True, help="A repository that has to be made is private.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent and stop.")
@options.json_option
def command(
    bundle: Path, repo_id: str, revision: str | None, private: bool, dry_run: bool, as_json: bool
) -> None:
    """Send what ORG/NAME lacks of BUNDLE, in one commit; the repository is made if there is none.

    Only files that the manifest lists are sent, each verified before. An interrupted push leaves the
    repository as it was, and goes on where it stopped. HF_TOKEN must allow writing.
    """
    from kttools.bundle.hub.client import Hub
    from kttools.bundle.hub.push import Pusher

    pusher = Pusher(Hub(repo_id, revision), bundle, private)
    plan = pusher.plan()
    if not as_json:
        click.echo(plan.line())
    document = plan.to_dict()
    if not dry_run:
        with ByteProgress("push", is_quiet=options.settings().quiet) as progress:
            progress.start(plan.send_bytes)
            document["commit"] = pusher.run(plan, progress.advance)
        if not as_json:
            click.echo(f"{repo_id}: at commit {document['commit']}")
    if as_json:
        click.echo(json.dumps(document, indent=1))
