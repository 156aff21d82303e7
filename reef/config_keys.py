"""`reef config-keys`: prints all keys of a config file."""

import click


@click.command(name="config-keys")
def config_keys() -> None:
    """Print all keys of a config file.

    With their defaults and meanings, as the table in docs/configuration.md.
    """
    from deployments.config_table import config_table

    click.echo(config_table())
