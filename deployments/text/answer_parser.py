"""AnswerParser: part an answer, as it grows, into reasoning, text and calls of tools."""

from deployments.text.deltas import Delta, Reasoning
from deployments.text.reasoning import ReasoningSplitter
from deployments.text.tools.call import ToolCall
from deployments.text.tools.call_parser import CallParser, Piece


class AnswerParser:
    """After `is_done` nothing belongs to the answer any more: it has the one call it may have."""

    __slots__ = ("_calls", "_one_call", "_splitter", "has_calls", "is_done")

    def __init__(
        self,
        splitter: ReasoningSplitter | None,
        calls: CallParser | None,
        one_call: bool = False,
    ) -> None:
        self._splitter = splitter
        self._calls = calls
        self._one_call = one_call
        self.has_calls = False
        self.is_done = False

    def push(self, text: str) -> list[Delta]:
        splitter = self._splitter
        if splitter is None or splitter.is_over:
            return self._answer(text, is_whole=False)
        return self._parted(*splitter.push(text), is_whole=False)

    def flush(self) -> list[Delta]:
        """Return the rest. Nothing may be pushed after it."""
        rest = ("", "") if self._splitter is None else self._splitter.flush()
        return self._parted(*rest, is_whole=True)

    def _parted(self, reasoning: str, answer: str, is_whole: bool) -> list[Delta]:
        begun: list[Delta] = [Reasoning(reasoning)] if reasoning else []
        return begun + self._answer(answer, is_whole)

    def _answer(self, text: str, is_whole: bool) -> list[Delta]:
        if self._calls is None:
            return [text] if text else []
        if self.is_done:
            return []
        pieces = self._calls.push(text)
        if is_whole:
            pieces += self._calls.flush()
        return self._counted(pieces)

    def _counted(self, pieces: list[Piece]) -> list[Delta]:
        deltas: list[Delta] = []
        for piece in pieces:
            deltas.append(piece)
            if isinstance(piece, ToolCall):
                self.has_calls = True
                if self._one_call:
                    self.is_done = True
                    break
        return deltas
