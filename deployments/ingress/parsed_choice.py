"""ParsedChoice: an answer whose text holds reasoning or calls of tools."""

from collections.abc import Sequence

from deployments.ingress.choice import Choice, TokenEntry
from deployments.ingress.text_tokens import TextTokens
from deployments.text.answer_syntax import Parser
from deployments.text.deltas import Delta, Reasoning
from deployments.text.detokenizer import Detokenizer
from engine.messages import RequestOutput, TokenLogprobs


class ParsedChoice(Choice):
    """What the parser makes of the text gathers in deltas until a reply takes them.

    Stop strings are looked for in the text, before it is parsed. A token counts as the kind of
    delta that it completes, so tags count for what follows them.
    """

    __slots__ = ("_deltas", "_num_attributed", "_parser", "_text_tokens", "num_reasoning_tokens")

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
        self._num_attributed = 0  # tokens whose kind is known
        self._text_tokens = TextTokens()
        self.num_reasoning_tokens = 0

    def take_deltas(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def take_text_entries(self, num_characters: int) -> list[TokenEntry]:
        return self._text_tokens.take(num_characters)

    def push(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None
    ) -> str:
        shown = ""
        for at, token_id in enumerate(token_ids):
            if self.finish_reason is not None:
                break  # the rest comes after the end and is not billed
            text = super().push((token_id,), None if logprobs is None else (logprobs[at],))
            if logprobs is not None:
                self._text_tokens.add(self.unsent_entries[-1], text)
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
            self._take(parser.push(text))
        if self.finish_reason is not None:
            self._take(parser.flush())
            if parser.has_calls and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        elif parser.is_done:
            self.finish_reason = "tool_calls"

    def _take(self, deltas: list[Delta]) -> None:
        if not deltas:
            return
        self._deltas += deltas
        self._text_tokens.attribute(deltas)
        if isinstance(deltas[-1], Reasoning):
            self.num_reasoning_tokens += len(self.token_ids) - self._num_attributed
        self._num_attributed = len(self.token_ids)
