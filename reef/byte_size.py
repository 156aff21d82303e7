"""Reads sizes such as 24GiB of a command line."""

import click

from engine.byte_size import parse_byte_size


def byte_size(text: str) -> int:
    try:
        size = parse_byte_size(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None
    if size <= 0:
        raise click.BadParameter(f"{text!r} is not above 0.")
    return size
