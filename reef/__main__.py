"""Runs the `reef` command: one entry point for everything that is done from a shell.

Exit status: 0 done; 1 `verify` or `check` found something wrong; 2 refused or failed, with the
reason on stderr.
"""

import sys
from collections.abc import Sequence

import click
from click.exceptions import NoArgsIsHelpError

REFUSED = 2
INTERRUPTED = 130  # a shell's status for a command that SIGINT ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        return _run(arguments)
    except NoArgsIsHelpError as error:
        error.show()
    except click.UsageError as error:
        where = "reef" if error.ctx is None else error.ctx.command_path
        _say(f"{error.format_message()} See '{where} --help'.")
    except click.ClickException as error:
        _say(error.format_message())
    except click.Abort:
        return INTERRUPTED
    return REFUSED


def _run(arguments: Sequence[str] | None) -> int:
    _check_installation()  # before importing modules that others may hide
    from reef.commands import reef

    return reef.main(arguments, prog_name="reef", standalone_mode=False) or 0


def _check_installation() -> None:
    try:
        from deployments.installation import WrongInstallation, check_one_installation
    except ImportError as error:
        raise click.ClickException(
            f"the package 'deployments' is another project's: {error}"
        ) from None
    try:
        check_one_installation()
    except WrongInstallation as error:
        raise click.ClickException(str(error)) from None


def _say(sentence: str) -> None:
    print(f"reef: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
