"""Scanner: read a text that is still being written.

Its readers are generators: where the text ends for now they yield, and when they are resumed they
go on with what has been added. Every character is read once, however the text is cut.
"""

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from deployments.text.tools.call import NotACall

MAX_DEPTH = 64  # of values inside values

T = TypeVar("T")
Reading = Generator[None, None, T]


@dataclass(frozen=True, slots=True)
class Notation:
    """How a value in brackets is written: its quotes, and what may stand outside of strings."""

    openers: str
    closers: str
    strings: dict[str, re.Pattern[str]]  # by their quote: what needs no second look inside
    between: re.Pattern[str]


JSON = Notation("{[", "}]", {'"': re.compile(r'[^"\\]*+')}, re.compile(r"[\s,:0-9a-zE+.\-]*+"))
PYTHON = Notation(
    "[({",
    "])}",
    {'"': re.compile(r'[^"\\]*+'), "'": re.compile(r"[^'\\]*+")},
    re.compile(r"[\s,:=\w+.\-]*+"),
)


class Scanner:
    """`rest` is what has not been read, `is_whole` says that no more will be added."""

    __slots__ = ("_read", "is_whole", "rest")

    def __init__(self) -> None:
        self.rest = ""
        self.is_whole = False
        self._read: list[str] = []

    def add(self, text: str) -> None:
        self.rest += text

    def take(self, length: int) -> str:
        taken, self.rest = self.rest[:length], self.rest[length:]
        self._read.append(taken)
        return taken

    def take_read(self) -> str:
        """Return all that was read since this was called before."""
        text = "".join(self._read)
        self._read.clear()
        return text

    def take_before(self, *markers: str) -> tuple[str, str]:
        """Read what cannot belong to a marker. Returns it, and the marker that is next, or ""."""
        places = [(at, marker) for marker in markers if (at := self.rest.find(marker)) >= 0]
        if places:
            at, marker = min(places)
            return self.take(at), marker
        keep = 0 if self.is_whole else max(overlap(self.rest, marker) for marker in markers)
        return self.take(len(self.rest) - keep), ""

    # ---- readers: raise NotACall at what is not as wanted ----------------------------------

    def space(self) -> Reading[None]:
        """Read white space, also none."""
        while True:
            self.take(len(self.rest) - len(self.rest.lstrip()))
            if self.rest or self.is_whole:
                return
            yield

    def peek(self) -> Reading[str]:
        """Return the next character but white space, without reading it; "" at the end."""
        while not self.rest.strip() and not self.is_whole:
            yield
        return self.rest.lstrip()[:1]

    def starts_with(self, text: str) -> Reading[bool]:
        """Tell whether this is next, without reading it."""
        while len(self.rest) < len(text) and text.startswith(self.rest) and not self.is_whole:
            yield
        return self.rest.startswith(text)

    def literal(self, text: str, may_end: bool = False) -> Reading[None]:
        """Read exactly this; with `may_end` also a part of it, with which the whole text ends."""
        if (yield from self.starts_with(text)):
            self.take(len(text))
        elif may_end and self.is_whole and text.startswith(self.rest):
            self.take(len(self.rest))
        else:
            raise NotACall

    def match(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Read as much as the pattern matches. It must match each beginning of what it matches."""
        while True:
            found = pattern.match(self.rest)
            end = 0 if found is None else found.end()
            if end < len(self.rest) or self.is_whole:
                break
            yield
        if end == 0:
            raise NotACall
        return self.take(end)

    def until(self, marker: str) -> Reading[str]:
        """Read everything before the marker, and the marker."""
        text, found = yield from self.before((marker,))
        if not found:
            raise NotACall
        self.take(len(marker))
        return text

    def before(self, markers: Sequence[str]) -> Reading[tuple[str, str]]:
        """Read everything before a marker. Returns it, and the marker; "" if there is none."""
        parts: list[str] = []
        while True:
            text, marker = self.take_before(*markers)
            parts.append(text)
            if marker or self.is_whole:
                return "".join(parts), marker
            yield

    def value_before(self, markers: Sequence[str]) -> Reading[tuple[str, str]]:
        """Read everything before a marker, also JSON in brackets with a marker in its strings."""
        value = ""
        if (yield from self.peek()) in JSON.openers:
            value = self.take(len(self.rest) - len(self.rest.lstrip()))
            value += yield from self._tried_brackets()
        rest, marker = yield from self.before(markers)
        return value + rest, marker

    def _tried_brackets(self) -> Reading[str]:
        """Read a value in brackets, or nothing if what is there is none."""
        state, parts = _Brackets(JSON), list[str]()
        while not state.is_done:
            end, is_bad = state.advance(self.rest)
            parts.append(self.take(end))
            if is_bad or (self.is_whole and not state.is_done):
                self._put_back("".join(parts))
                return ""
            if not state.is_done:
                yield
        return "".join(parts)

    def _put_back(self, text: str) -> None:
        read = "".join(self._read)
        self._read = [read[: len(read) - len(text)]]
        self.rest = text + self.rest

    def brackets(self, notation: Notation) -> Reading[str]:
        """Read a value in brackets to its end. Stops at a character that it cannot contain."""
        parts: list[str] = []
        state = _Brackets(notation)
        while True:
            end, is_bad = state.advance(self.rest)
            parts.append(self.take(end))
            if is_bad:
                raise NotACall
            if state.is_done:
                return "".join(parts)
            if self.is_whole:
                raise NotACall
            yield


class _Brackets:
    """Where a value in brackets is being read: how deep, and in which string."""

    __slots__ = ("_depth", "_notation", "_quote", "is_done")

    def __init__(self, notation: Notation) -> None:
        self._notation = notation
        self._depth = 0
        self._quote = ""
        self.is_done = False

    def advance(self, text: str) -> tuple[int, bool]:
        """Read on. Returns how far, and whether what is there cannot belong to the value."""
        at = 0
        while not self.is_done:
            at = self._skip(text, at)
            if at >= len(text):
                return at, False
            if text[at] == "\\" and self._quote:
                if at + 1 == len(text):
                    return at, False  # what is escaped comes with the next text
                at += 2
            elif not self._take(text[at]):
                return at, True
            else:
                at += 1
        return at, False

    def _skip(self, text: str, at: int) -> int:
        if not self._quote and not self._depth:
            return at
        plain = self._notation.strings[self._quote] if self._quote else self._notation.between
        found = plain.match(text, at)
        return at if found is None else found.end()

    def _take(self, character: str) -> bool:
        if self._quote:
            self._quote = ""
        elif character in self._notation.openers and self._depth < MAX_DEPTH:
            self._depth += 1
        elif character in self._notation.closers and self._depth:
            self._depth -= 1
            self.is_done = not self._depth
        elif character in self._notation.strings and self._depth:
            self._quote = character
        else:
            return False
        return True


def overlap(text: str, marker: str) -> int:
    """Measure the longest end of `text` with which the marker begins."""
    first = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    if first < 0:
        return 0
    for length in range(len(text) - first, 0, -1):
        if marker.startswith(text[len(text) - length :]):
            return length
    return 0
