"""`reef new-key`: makes an API key and shows it once."""

from pathlib import Path

import click

from reef.refusal import refusing


@click.command(name="new-key")
@click.argument("tenant", required=False)
@click.option("--metrics", is_flag=True, help="A key for /metrics alone.")
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    help="The keys file; made if there is none, rewritten without comments.",
)
def new_key(tenant: str | None, metrics: bool, file: Path | None) -> None:
    """Make an API key and print it once.

    It is for TENANT or, with --metrics, for /metrics alone. Only its hash is stored.
    """
    from deployments.tenants.new_key import make_key
    from engine.config import ConfigError

    if (tenant is None) != metrics:
        raise click.UsageError("Name a tenant, or write --metrics.")
    with refusing(ConfigError, OSError):
        click.echo(make_key(tenant, file))
