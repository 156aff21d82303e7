"""`reef bench`: lists the benchmark programs of a checkout and runs one of them."""

import ast
import subprocess
import sys
from pathlib import Path

import click

from reef.refusal import refusing

FOLDER = "tests/bench"


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("program", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(program: str | None, arguments: tuple[str, ...]) -> None:
    """Run a benchmark, or list them.

    PROGRAM gets all ARGUMENTS; its paths are relative to the checkout.
    """
    from deployments.installation import WrongInstallation, checkout_root

    with refusing(WrongInstallation):
        root = checkout_root(FOLDER)
    programs = _programs(root / FOLDER)
    if program is None:
        _list(programs)
    elif program not in programs:
        raise click.UsageError(f"There is no program {program!r}; `reef bench` lists them.")
    else:
        command = [sys.executable, "-m", f"tests.bench.{program}", *arguments]
        raise click.exceptions.Exit(subprocess.run(command, cwd=root, check=False).returncode)


def _programs(folder: Path) -> dict[str, str]:
    """Map each program to the first line of its docstring."""
    texts = {path.stem: path.read_text() for path in sorted(folder.glob("*.py"))}
    return {
        name: (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        for name, text in texts.items()
        if 'if __name__ == "__main__":' in text
    }


def _list(programs: dict[str, str]) -> None:
    click.echo("Each program prints one line and its conditions; results: tests/bench/LOG.md\n")
    width = max(map(len, programs))
    for name, text in programs.items():
        click.echo(f"  reef bench {name:{width}}  {text}")
    click.echo("\nThose that need a server say so; `make serve` starts one.")
