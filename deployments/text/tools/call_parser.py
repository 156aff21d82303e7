"""CallParser: part an answer, as it grows, into text and calls.

A call is given out when it is whole, and text when it cannot belong to one any more. What begins as
a call and is none stays text.
"""

from collections.abc import Generator, Iterator

from deployments.text.tools.call import NotACall, ToolCall
from deployments.text.tools.call_reader import CallReader, Schemas
from deployments.text.tools.formats import ToolFormat
from deployments.text.tools.scanner import Scanner

Piece = str | ToolCall


class CallParser:
    """White space around calls is dropped if no text follows them: templates write their own.

    `no_text`: an answer that begins with text has no calls, and what looks like one is text.
    """

    __slots__ = (
        "_has_calls",
        "_is_text",
        "_may_begin",
        "_no_text",
        "_reader",
        "_reading",
        "_scanner",
        "_space",
    )

    def __init__(self, form: ToolFormat, schemas: Schemas, no_text: bool = False) -> None:
        self._reader = CallReader(form, schemas)
        self._scanner = Scanner()
        self._reading: Generator[ToolCall | None] | None = None
        self._may_begin = True
        self._has_calls = False
        self._no_text = no_text
        self._is_text = False
        self._space = ""  # held back: a call may follow it

    def push(self, text: str) -> list[Piece]:
        self._scanner.add(text)
        return [piece for piece in self._advance() if piece]

    def flush(self) -> list[Piece]:
        """Return the rest. Nothing may be pushed after it."""
        self._scanner.is_whole = True
        pieces = [piece for piece in self._advance() if piece]
        if not self._has_calls and self._space:
            pieces.append(self._space)
        return pieces

    def _advance(self) -> Iterator[Piece]:
        while True:
            if self._reading is None:
                text, is_next = self._before_call()
                yield self._without_space(text)
                if not is_next:
                    return
                self._reading = self._reader.read(self._scanner)
            try:
                for call in self._reading:
                    if call is None:
                        return
                    yield self._taken(call)
            except NotACall:
                yield self._without_space(self._scanner.take_read())
            self._reading = None
            self._scanner.take_read()

    def _before_call(self) -> tuple[str, str | bool]:
        """Read up to where a call may begin. Tells whether it does."""
        scanner = self._scanner
        if self._reader.opening:
            text, is_next = scanner.take_before(self._reader.opening)
            self._is_text = self._is_text or (self._no_text and bool(text.strip()))
            if self._is_text:
                text, is_next = text + scanner.take(len(scanner.rest)), ""
            scanner.take_read()
            return text, is_next
        text = scanner.take(self._num_before_bare())
        scanner.take_read()
        is_next = self._may_begin and bool(scanner.rest)
        self._may_begin = self._may_begin and not is_next and not text.strip()
        return text, is_next

    def _num_before_bare(self) -> int:
        """Measure what cannot begin an answer that is a call: all but white space and a bracket."""
        rest = self._scanner.rest
        num_space = len(rest) - len(rest.lstrip())
        is_call = self._may_begin and rest[num_space : num_space + 1] in ("{", "[")
        return num_space if is_call else len(rest)

    def _taken(self, call: ToolCall) -> ToolCall:
        self._scanner.take_read()
        self._has_calls = True
        return call

    def _without_space(self, text: str) -> str:
        """Hold back the white space at the end."""
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        return shown
