"""`reef serve`: runs the server on a Ray cluster of its own."""

from pathlib import Path

import click

from reef.refusal import refusing


@click.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=Path("configs/dev-cpu.yaml"),
    show_default=True,
    help="A Ray Serve config file.",
)
@click.option("--host", help="The address to listen on.  [default: the file's, or 127.0.0.1]")
@click.option("--port", type=int, help="The port.  [default: the file's, or 8000]")
def serve(config: Path, host: str | None, port: int | None) -> None:
    """Serve a configuration until Ctrl-C.

    It runs on a Ray cluster of its own, which ends with it.
    """
    from adapter_store.errors import AdapterStoreError
    from deployments.installation import WrongInstallation
    from deployments.local.serve import ServerStartFailed, serve_locally
    from engine.config import ConfigError

    with refusing(AdapterStoreError, ConfigError, OSError, ServerStartFailed, WrongInstallation):
        serve_locally(config, host, port)
