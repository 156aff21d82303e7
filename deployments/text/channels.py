"""ChannelParser: part an answer into channels, as gpt-oss writes them.

    <|channel|>analysis<|message|>reasoning<|end|>
    <|start|>assistant<|channel|>commentary to=functions.name<|message|>{"arguments": 1}<|call|>
    <|start|>assistant<|channel|>final<|message|>text

Each part has a header, which says what it is; the first one begins where the prompt ends.
"""

import re
from collections.abc import Iterator

from deployments.text.deltas import Delta, Reasoning
from deployments.text.tools.bodies import checked_object
from deployments.text.tools.call import NAME, NotACall, ToolCall
from deployments.text.tools.scanner import Reading, Scanner

MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>")

_MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_HEADERS = ("<|channel|>", "<|start|>", "<|constrain|>", "<|message|>", "to=")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_CALLED = re.compile(rf"\bto=functions\.({NAME})")


class ChannelParser:
    """A call is given out at its end. If its arguments are no object it is text, header and all."""

    __slots__ = (
        "_body",
        "_called",
        "_header",
        "_is_thought",
        "_one_call",
        "_reading",
        "_scanner",
        "_state",
        "has_calls",
        "is_done",
    )

    def __init__(self, one_call: bool = False) -> None:
        self._scanner = Scanner()
        self._one_call = one_call
        self._state = "start"
        self._header: list[str] = []
        self._body: list[str] = []  # of a call
        self._reading: Reading[tuple[str, str]] | None = None
        self._called: str | None = None
        self._is_thought = False
        self.has_calls = False
        self.is_done = False

    def push(self, text: str) -> list[Delta]:
        self._scanner.add(text)
        deltas = [delta for delta in self._advance() if delta]
        self._scanner.take_read()
        return deltas

    def flush(self) -> list[Delta]:
        """Return the rest. Nothing may be pushed after it."""
        self._scanner.is_whole = True
        deltas = self.push("")
        if self._state == "header" and not self.is_done:
            deltas.append("".join(self._header))
        elif self._state == "call" and not self.is_done:
            deltas.append(self._call_or_text())
        return [delta for delta in deltas if delta]

    def _advance(self) -> Iterator[Delta]:
        while not self.is_done:
            if self._state == "start" and not self._begin():
                return
            if self._state == "header":
                text, is_next = self._scanner.take_before(_MESSAGE)
                self._header.append(text)
                if not is_next:
                    return
                self._header.append(self._scanner.take(len(_MESSAGE)))
                self._read_header()
            if self._state == "call":
                found = self._call_body()
                if found is None:
                    return
                text, end = found
            else:
                text, end = self._scanner.take_before(*ENDS)
            yield from self._part(text, bool(end))
            if not end:
                return
            if end != "<|start|>":
                self._scanner.take(len(end))
            self._state, self._header = "start", []

    def _call_body(self) -> tuple[str, str] | None:
        """Read the rest of a call, and the mark behind it; None if more of it may come."""
        self._reading = self._reading or self._scanner.value_before(ENDS)
        try:
            next(self._reading)
        except StopIteration as stop:
            self._reading = None
            return stop.value
        return None

    def _begin(self) -> bool:
        """Tell a header from text without one. Returns whether it is known."""
        rest = self._scanner.rest.lstrip()
        is_whole = self._scanner.is_whole
        if any(rest.startswith(each) for each in _HEADERS):
            self._state = "header"
        elif not is_whole and any(each.startswith(rest) for each in _HEADERS):
            return False
        else:
            self._state, self._is_thought = "text", False
        return True

    def _read_header(self) -> None:
        header = "".join(self._header)
        channel, called = _CHANNEL.search(header), _CALLED.search(header)
        self._called = called[1] if called else None
        self._is_thought = channel is not None and channel[1] == "analysis"
        self._state = "call" if called else "text"
        self._body = []

    def _part(self, text: str, is_end: bool) -> Iterator[Delta]:
        if self._state != "call":
            if text:
                yield Reasoning(text) if self._is_thought else text
            return
        self._body.append(text)
        if is_end:
            yield self._call_or_text()

    def _call_or_text(self) -> Delta:
        body = "".join(self._body)
        assert self._called is not None, "only a header that names a tool begins a call"
        try:
            call = ToolCall(self._called, checked_object(body.strip()))
        except NotACall:
            return "".join(self._header) + body
        self.has_calls = True
        self.is_done = self._one_call
        return call
