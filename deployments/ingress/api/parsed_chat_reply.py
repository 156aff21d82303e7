"""Write chats whose answers hold reasoning or calls of tools."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deployments.ingress.api.openai_replies import ChatReply, ReplyHead
from deployments.ingress.choice import Choice
from deployments.ingress.parsed_choice import ParsedChoice
from deployments.text.deltas import Delta, Reasoning
from deployments.text.tools.call import ToolCall
from deployments.text.vocabulary import Vocabulary


class ParsedChatReply(ChatReply):
    """A call comes in two chunks: its id and name, then its arguments.

    An answer whose call the request has named ends with `stop`, as OpenAI has it.
    """

    def __init__(
        self,
        head: ReplyHead,
        vocabulary: Vocabulary,
        prompts: Sequence[Sequence[int]],
        n: int,
        new_call_id: Callable[[], str],
        shows_reasoning: bool = True,
        names_call: bool = False,
    ) -> None:
        super().__init__(head, vocabulary, prompts, n)
        self._new_call_id = new_call_id
        self._shows_reasoning = shows_reasoning
        self._names_call = names_call
        self._num_calls = [0] * n

    # ---- streams -------------------------------------------------------------------------

    def text(self, choice: Choice, text: str) -> bytes:
        """Write what the text has turned out to be; perhaps nothing yet."""
        return b"".join(self._chunks(choice))

    def closing(self, choice: Choice) -> bytes:
        return b"".join((*self._chunks(choice), super().closing(choice)))

    def _chunks(self, choice: Choice) -> Iterator[bytes]:
        for delta in _deltas(choice):
            if isinstance(delta, str):
                yield super().text(choice, delta)
            elif isinstance(delta, ToolCall):
                for part in self._call_parts(choice.index, delta):
                    yield self._delta_chunk(choice, {"tool_calls": [part]})
            elif self._shows_reasoning:
                yield self._delta_chunk(choice, _reasoning(delta.text))

    def _call_parts(self, index: int, call: ToolCall) -> Iterator[dict[str, Any]]:
        at = self._num_calls[index]
        self._num_calls[index] += 1
        yield {"index": at, **self._call(ToolCall(call.name, ""))}
        yield {"index": at, "function": {"arguments": call.arguments}}

    def _delta_chunk(self, choice: Choice, delta: dict[str, Any]) -> bytes:
        document = {**self._chunk_choice(choice, None), "delta": delta}
        return self._chunk(document, len(choice.token_ids))

    # ---- whole answers -------------------------------------------------------------------

    def _whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        deltas = _deltas(choice)
        content = "".join(delta for delta in deltas if isinstance(delta, str))
        thought = "".join(delta.text for delta in deltas if isinstance(delta, Reasoning))
        calls = [self._call(delta) for delta in deltas if isinstance(delta, ToolCall)]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if calls or thought else ""),
            "refusal": None,
        }
        if thought and self._shows_reasoning:
            message |= _reasoning(thought)
        if calls:
            message["tool_calls"] = calls
        return {"index": choice.index, "message": message, **self._end(choice)}

    def _reason(self, choice: Choice) -> str | None:
        is_called = choice.finish_reason == "tool_calls"
        return "stop" if is_called and self._names_call else choice.finish_reason

    def _call(self, call: ToolCall) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": self._new_call_id(), "type": "function", "function": function}


def _deltas(choice: Choice) -> list[Delta]:
    assert isinstance(choice, ParsedChoice), "the plan makes no others"
    return choice.take_deltas()


def _reasoning(text: str) -> dict[str, str]:
    """Name reasoning as most clients read it, and as vLLM does."""
    return {"reasoning_content": text, "reasoning": text}
