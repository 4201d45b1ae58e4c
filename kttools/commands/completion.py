"""kttools completion: the script that teaches a shell our commands and options."""

import click
from click.shell_completion import get_completion_class

INSTALL = {
    "bash": 'eval "$(kttools completion bash)"          # in ~/.bashrc',
    "zsh": 'eval "$(kttools completion zsh)"           # in ~/.zshrc',
    "fish": "kttools completion fish | source           # in ~/.config/fish/config.fish",
}


@click.command(
    help="Print the shell completion script.\n\n\b\nExamples:\n  " + "\n  ".join(INSTALL.values()),
)
@click.argument("shell", type=click.Choice(sorted(INSTALL)))
def command(shell: str) -> None:
    """Prints click's own script for the shell."""
    root = click.get_current_context().find_root().command
    completion = get_completion_class(shell)
    if completion is None:
        raise click.UsageError(f"no completion for {shell}")
    script = completion(root, {}, "kttools", "_KTTOOLS_COMPLETE").source()
    click.echo(script)
