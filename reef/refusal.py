"""Turns what a package raises on purpose into the one line that the command says."""

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
    """Leave out the number that Python puts before the words of the operating system."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
