"""ParsedChoice: an answer whose text holds reasoning or calls of tools."""

from collections.abc import Sequence

from deployments.ingress.choice import Choice
from deployments.text.answer_syntax import Parser
from deployments.text.deltas import Delta
from deployments.text.detokenizer import Detokenizer
from engine.messages import RequestOutput, TokenLogprobs


class ParsedChoice(Choice):
    """What the parser makes of the text gathers in deltas until a reply takes them.

    Stop strings are looked for in the text, before it is parsed.
    """

    __slots__ = ("_deltas", "_parser")

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        parser: Parser,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        super().__init__(index, detokenizer, stops, include_stop, min_tokens)
        self._parser = parser
        self._deltas: list[Delta] = []

    def take_deltas(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def push(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None
    ) -> str:
        shown = ""
        for at, token_id in enumerate(token_ids):
            if self.finish_reason is not None:
                break  # the rest comes after the end and is not billed
            text = super().push((token_id,), None if logprobs is None else (logprobs[at],))
            self._parse(text)
            shown += text
        return shown

    def _end(self, output: RequestOutput) -> str:
        text = super()._end(output)
        self._parse(text)
        return text

    def _parse(self, text: str) -> None:
        parser = self._parser
        if text:
            self._deltas += parser.push(text)
        if self.finish_reason is not None:
            self._deltas += parser.flush()
            if parser.has_calls and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        elif parser.is_done:
            self.finish_reason = "tool_calls"
