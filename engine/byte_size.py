"""Reads and writes sizes in bytes as people do: `2GiB`, `1.5 KB`, `4096`. The only such grammar."""

import re

DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
UNITS = {"B": 1, **DECIMAL, **BINARY}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_byte_size(text: str) -> int:
    """Parse a size. Raises ValueError, which names the text and the known units."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in {"", *UNITS}:
        units = ", ".join(UNITS)
        raise ValueError(f"{text!r} is not a size in bytes: a number, then one of {units}")
    return int(float(match[1]) * UNITS.get(match[2], 1))


def format_byte_size(num_bytes: int) -> str:
    """Format as `1.50 GiB`: in the largest binary unit up to GiB that gives at least 1, or KiB."""
    unit = next((unit for unit in ("GiB", "MiB") if num_bytes >= BINARY[unit]), "KiB")
    return f"{num_bytes / BINARY[unit]:,.2f} {unit}"
