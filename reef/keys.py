"""`reef new-key`: makes an API key and shows it once."""

from pathlib import Path

import click

from reef.refusal import refusing


@click.command(name="new-key")
@click.argument("tenant", required=False)
@click.option("--metrics", is_flag=True, help="A key for /metrics alone.")
@click.option("--publish", metavar="NAME", help="A key for TENANT's adapters in the admin API.")
@click.option("--admin", metavar="NAME", help="A key for everybody's adapters in the admin API.")
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    help="The keys file; made if there is none, rewritten without comments.",
)
def new_key(
    tenant: str | None, metrics: bool, publish: str | None, admin: str | None, file: Path | None
) -> None:
    """Make an API key and print it once.

    It is for TENANT's requests or, with --publish NAME, for its adapters; with --metrics for
    /metrics alone, with --admin NAME for everybody's adapters. NAME says in the audit log who it
    was. Only the key's hash is stored.
    """
    from deployments.tenants.new_key import Purpose, make_key
    from engine.config import ConfigError

    if (tenant is None) != (metrics or admin is not None) or (metrics and admin is not None):
        raise click.UsageError("Name a tenant, or write --metrics or --admin NAME.")
    if publish is not None and tenant is None:
        raise click.UsageError("--publish needs a tenant; --admin is for all of them.")
    with refusing(ConfigError, OSError):
        click.echo(make_key(Purpose(tenant, publish or admin), file))
