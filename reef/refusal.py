"""Turns expected errors of a package into the one line that the command prints."""

from collections.abc import Generator
from contextlib import contextmanager

import click


@contextmanager
def refusing(*errors: type[Exception]) -> Generator[None, None, None]:
    """Refuse the command with the message of these errors; all others keep their traceback."""
    try:
        yield
    except errors as error:
        raise click.ClickException(_sentence(error)) from None


def _sentence(error: Exception) -> str:
    """Format an error without the number that Python puts before the system's message."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
