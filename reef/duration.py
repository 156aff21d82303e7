"""Reads a length of time such as `90s`, `10m`, `24h` or `7d`."""

import re

import click

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile("([0-9]{1,6})([smhd])")


class Duration(click.ParamType[int]):
    """An option's value in seconds."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the seconds; refuse anything but a whole number and its unit."""
        match = _DURATION.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is not a time from 0s to 999999d, such as 90s, 10m, 24h or 7d")
        return int(match[1]) * _SECONDS[match[2]]
