"""`reef check`: tests the demo's adapters on a running server."""

import sys
from pathlib import Path

import click

from reef.refusal import refusing

NOT_GOOD_ENOUGH = 1


@click.command()
@click.argument("url", default="http://127.0.0.1:8000")
@click.option(
    "--demo",
    type=click.Path(path_type=Path),
    default=Path(".data/demo"),
    show_default=True,
    help="The folder that `reef serve` has made.",
)
@click.option("--base", default="demo", show_default=True, help="The base model's name.")
def check(url: str, demo: Path, base: str) -> None:
    """Ask a server what the demo has learned.

    Sends the held-out prompts of all adapters and the base to the server at URL, mixed. Ends with
    status 1 if an adapter gets less than 95 % right or the base more than 20 %.
    """
    from deployments.installation import WrongInstallation, checkout_root

    with refusing(WrongInstallation, OSError):
        sys.path.insert(0, str(checkout_root("examples/demo")))
        from examples.demo.check import HELD_OUT, check_demo

        if not (demo / HELD_OUT).is_file():
            raise OSError(
                f"{demo} holds no demo: `reef serve` makes it, or --demo says where it is"
            )
        if not check_demo(url.rstrip("/"), demo, base):
            raise click.exceptions.Exit(NOT_GOOD_ENOUGH)
