"""kttools bundle: move bundles. A group; each command below it is a file bundle_<name>.py beside this one."""

import click

from kttools import options

GROUP_EPILOG = """\b
Examples:
  kttools bundle pack ./model-int8 -o model-int8.ktz --split-size 4G
  kttools bundle unpack model-int8-*.ktz -o ./model-int8
  kttools bundle subset ./model-int8 -o ./model-int8-low --layers 0-30
"""
# Light modules only: what a command needs beyond click is imported when it runs.
COMMANDS: tuple[click.Command, ...] = ()


@click.group(
    epilog=GROUP_EPILOG,
    short_help="Pack, unpack and cut bundles.",
    context_settings={"token_normalize_func": options.normalise_token},
)
def command() -> None:
    """Turn a bundle into archive files and back, or into a smaller bundle."""


for _command in COMMANDS:
    command.add_command(options.adopt(_command))
