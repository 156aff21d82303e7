"""`reef completion`: prints the script with which a shell completes the command's words."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a SHELL.

    For bash and zsh: eval "$(reef completion bash)"; for fish: reef completion fish | source.
    """
    script = get_completion_class(shell)
    assert script is not None, "click knows all three"
    click.echo(script(context.find_root().command, {}, "reef", "_REEF_COMPLETE").source())
