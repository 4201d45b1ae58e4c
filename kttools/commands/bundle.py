"""kttools bundle: move bundles. A group; each command below it is a file bundle_<name>.py beside this one."""

import click

from kttools import options

from .bundle_pack import command as pack
from .bundle_pull import command as pull
from .bundle_push import command as push
from .bundle_subset import command as subset
from .bundle_unpack import command as unpack

GROUP_EPILOG = """\b
Examples:
  kttools bundle pack ./model-int8 -o model-int8.ktz --split-size 4G
  kttools bundle unpack model-int8-*.ktz -o ./model-int8
  kttools bundle subset ./model-int8 -o ./model-int8-low --layers 0-30
  kttools bundle push ./model-int8 org/model-int8
  kttools bundle pull org/model-int8 -o ./model-int8
"""
# Light modules only: what a command needs beyond click is imported when it runs.
COMMANDS: tuple[click.Command, ...] = (pack, unpack, subset, push, pull)


@click.group(
    epilog=GROUP_EPILOG,
    short_help="Pack, unpack, cut, send and fetch bundles.",
    context_settings={"token_normalize_func": options.normalise_token},
)
def command() -> None:
    """Turn a bundle into archive files and back, or into a smaller bundle; send it to the hub, fetch it."""


for _command in COMMANDS:
    command.add_command(options.adopt(_command))
