"""Pattern: a format's text, taken apart into what is literal, white space and slots."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

_PARTS = re.compile(r"\{(?P<slot>\w+)\}|(?P<space>\n+)|(?P<literal>[^\n{]+)")


@dataclass(frozen=True, slots=True)
class Literal:
    text: str


@dataclass(frozen=True, slots=True)
class Space:
    """White space, or none."""


@dataclass(frozen=True, slots=True)
class Slot:
    name: str
    ends_with: str = ""  # the literal behind it
    in_lines: bool = False  # one newline on each side does not belong to it


Part = Literal | Space | Slot


@cache
def parts_of(pattern: str) -> Sequence[Part]:
    parts = [_part(found) for found in _PARTS.finditer(pattern)]
    return _with_ends(_lines_joined(parts))


def opening_of(pattern: str) -> str:
    """Take what each text of this pattern begins with; "" if it is a slot."""
    first = parts_of(pattern)[0]
    return first.text if isinstance(first, Literal) else ""


def literals_of(pattern: str) -> list[str]:
    return [part.text for part in parts_of(pattern) if isinstance(part, Literal)]


def _part(found: re.Match[str]) -> Part:
    if found["slot"]:
        return Slot(found["slot"])
    return Space() if found["space"] else Literal(found["literal"])


def _lines_joined(parts: Sequence[Part]) -> list[Part]:
    """Make the newlines around a value a property of its slot."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, Space) and joined and joined[-1] == Slot("value"):
            joined[-1] = Slot("value", in_lines=True)
        elif part == Slot("value") and joined and joined[-1] == Space():
            joined[-1] = part
        else:
            joined.append(part)
    return joined


def _with_ends(parts: Sequence[Part]) -> Sequence[Part]:
    ended: list[Part] = []
    for at, part in enumerate(parts):
        behind = parts[at + 1] if at + 1 < len(parts) else None
        if isinstance(part, Slot) and isinstance(behind, Literal):
            part = Slot(part.name, behind.text, part.in_lines)
        ended.append(part)
    return ended
