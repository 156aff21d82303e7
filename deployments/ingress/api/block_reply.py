"""BlockReply: an answer as blocks of reasoning, text and calls, one behind the other."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from json.encoder import encode_basestring
from typing import Literal

from deployments.ingress.api.reply import Reply
from deployments.ingress.choice import Choice
from deployments.ingress.parsed_choice import ParsedChoice
from deployments.text.deltas import Delta, Reasoning
from deployments.text.tools.call import ToolCall

Kind = Literal["reasoning", "text"]
Frame = tuple[bytes, bytes]  # what an event has before and behind new text


class BlockReply(Reply):
    """For requests with one choice. Text of a block comes in events, a call is whole."""

    def __init__(self, shows_reasoning: bool = True) -> None:
        self._shows_reasoning = shows_reasoning
        self._open: Kind | None = None

    # ---- what a surface writes -----------------------------------------------------------

    def _start(self, kind: Kind) -> bytes:
        raise NotImplementedError

    def _grow(self, kind: Kind, text: str, choice: Choice) -> bytes:
        raise NotImplementedError

    def _end(self, kind: Kind) -> bytes:
        raise NotImplementedError

    def _call(self, call: ToolCall) -> bytes:
        raise NotImplementedError

    # ---- streams -------------------------------------------------------------------------

    def opening(self, index: int) -> bytes:
        return b""

    def text(self, choice: Choice, text: str) -> bytes:
        return b"".join(self._events(choice, text))

    def closing(self, choice: Choice) -> bytes:
        return b"".join((*self._events(choice, ""), self._end_open()))

    def _events(self, choice: Choice, text: str) -> Iterator[bytes]:
        for delta in _new_deltas(choice, text):
            if isinstance(delta, ToolCall):
                yield self._end_open()
                yield self._call(delta)
            elif isinstance(delta, str):
                yield self._grown("text", delta, choice)
            elif self._shows_reasoning:
                yield self._grown("reasoning", delta.text, choice)

    def _grown(self, kind: Kind, text: str, choice: Choice) -> bytes:
        if self._open == kind:
            return self._grow(kind, text, choice)
        ended = self._end_open()
        self._open = kind
        return b"".join((ended, self._start(kind), self._grow(kind, text, choice)))

    def _end_open(self) -> bytes:
        kind, self._open = self._open, None
        return b"" if kind is None else self._end(kind)

    # ---- whole answers -------------------------------------------------------------------

    def _blocks(self, choice: Choice, text: str) -> list[Delta]:
        """List the blocks of an answer, each of them whole."""
        blocks: list[Delta] = []
        for kind, group in groupby(_new_deltas(choice, text), key=type):
            if kind is ToolCall:
                blocks += group
            elif kind is str:
                blocks.append("".join(map(str, group)))
            elif self._shows_reasoning:
                thoughts = (delta.text for delta in group if isinstance(delta, Reasoning))
                blocks.append(Reasoning("".join(thoughts)))
        return blocks


def _new_deltas(choice: Choice, text: str) -> Sequence[Delta]:
    if isinstance(choice, ParsedChoice):
        return choice.take_deltas()
    return [text] if text else []


def num_reasoning_tokens(choice: Choice) -> int:
    return choice.num_reasoning_tokens if isinstance(choice, ParsedChoice) else 0


def framed(frame: Frame, text: str) -> bytes:
    """Write an event whose only variable part is a text, as JSON."""
    return b"".join((frame[0], encode_basestring(text).encode(), frame[1]))
