"""Write answers as Anthropic's Messages API does: whole messages and streams of events."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from deployments.ingress.api.block_reply import (
    BlockReply,
    Frame,
    Kind,
    framed,
    num_reasoning_tokens,
)
from deployments.ingress.api.openai_replies import ReplyHead
from deployments.ingress.api.reply import Usage
from deployments.ingress.choice import Choice
from deployments.text.deltas import Delta, Reasoning
from deployments.text.tools.call import ToolCall

# Nothing is signed, but some clients drop reasoning whose signature is empty.
SIGNATURE = "unsigned"
PING = b'event: ping\ndata: {"type":"ping"}\n\n'

_MARK = "\x00"
_DELTAS: dict[Kind, dict[str, str]] = {
    "text": {"type": "text_delta", "text": _MARK},
    "reasoning": {"type": "thinking_delta", "thinking": _MARK},
}


class MessagesReply(BlockReply):
    """`max_tokens` is what the client has asked for: an answer may end earlier, at the context."""

    def __init__(
        self,
        head: ReplyHead,
        new_call_id: Callable[[], str],
        max_tokens: int,
        shows_reasoning: bool = True,
    ) -> None:
        super().__init__(shows_reasoning)
        self._head = head
        self._new_call_id = new_call_id
        self._max_tokens = max_tokens
        self._num_blocks = 0
        self._frame: Frame = (b"", b"")
        self._ended: Choice | None = None

    # ---- streams -------------------------------------------------------------------------

    def begin(self, usage: Usage) -> bytes:
        ends = {"stop_reason": None, "stop_sequence": None}
        message = {**self._message([]), **ends, "usage": _usage(usage)}
        return _event("message_start", message=message)

    def ending(self, usage: Usage | None) -> bytes:
        assert usage is not None and self._ended is not None, "the request asks for the usage"
        counts = _usage(usage, num_reasoning_tokens(self._ended))
        delta = _event("message_delta", delta=self._end_of(self._ended), usage=counts)
        return delta + _event("message_stop")

    def closing(self, choice: Choice) -> bytes:
        self._ended = choice
        return super().closing(choice)

    def _start(self, kind: Kind) -> bytes:
        block = _text_block("") if kind == "text" else _thinking_block("", "")
        index = self._num_blocks
        event = _event("content_block_delta", index=index, delta=_DELTAS[kind])
        before, _, after = event.partition(msgspec.json.encode(_MARK))
        self._frame = before, after
        return _event("content_block_start", index=index, content_block=block)

    def _grow(self, kind: Kind, text: str, choice: Choice) -> bytes:
        return framed(self._frame, text)

    def _end(self, kind: Kind) -> bytes:
        index = self._num_blocks
        self._num_blocks += 1
        end = _event("content_block_stop", index=index)
        if kind == "text":
            return end
        signature = {"type": "signature_delta", "signature": SIGNATURE}
        return _event("content_block_delta", index=index, delta=signature) + end

    def _call(self, call: ToolCall) -> bytes:
        index = self._num_blocks
        self._num_blocks += 1
        arguments = {"type": "input_json_delta", "partial_json": call.arguments}
        return b"".join(
            (
                _event("content_block_start", index=index, content_block=self._tool_use(call, {})),
                _event("content_block_delta", index=index, delta=arguments),
                _event("content_block_stop", index=index),
            )
        )

    # ---- whole answers -------------------------------------------------------------------

    def whole(self, choices: Sequence[Choice], texts: Sequence[str], usage: Usage) -> bytes:
        [choice], [text] = choices, texts
        message = self._message([self._block(block) for block in self._blocks(choice, text)])
        counts = _usage(usage, num_reasoning_tokens(choice))
        return msgspec.json.encode({**message, **self._end_of(choice), "usage": counts})

    def _block(self, block: Delta) -> dict[str, Any]:
        if isinstance(block, ToolCall):
            return self._tool_use(block, msgspec.Raw(block.arguments.encode()))
        if isinstance(block, Reasoning):
            return _thinking_block(block.text, SIGNATURE)
        return _text_block(block)

    # ---- both ----------------------------------------------------------------------------

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        fields = {"id": self._head.reply_id, "type": "message", "role": "assistant"}
        return {**fields, "model": self._head.model, "content": content}

    def _tool_use(self, call: ToolCall, arguments: object) -> dict[str, Any]:
        call_id = self._new_call_id()
        if call_id.startswith("call_"):
            call_id = f"toolu_{call_id.removeprefix('call_')}"
        return {"type": "tool_use", "id": call_id, "name": call.name, "input": arguments}

    def _end_of(self, choice: Choice) -> dict[str, Any]:
        """Say why an answer ended."""
        stop = choice.stop_reason if isinstance(choice.stop_reason, str) else None
        if choice.finish_reason == "tool_calls":
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if choice.finish_reason == "length":
            at_limit = len(choice.token_ids) >= self._max_tokens
            reason = "max_tokens" if at_limit else "model_context_window_exceeded"
            return {"stop_reason": reason, "stop_sequence": None}
        return {"stop_reason": "stop_sequence" if stop else "end_turn", "stop_sequence": stop}


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _thinking_block(text: str, signature: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": signature}


def _usage(usage: Usage, num_reasoning: int = 0) -> dict[str, Any]:
    """Count cached tokens apart from the others of the prompt, as this API does."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"thinking_tokens": num_reasoning},
    }


def _event(kind: str, **fields: Any) -> bytes:
    document = msgspec.json.encode({"type": kind, **fields})
    return b"".join((b"event: ", kind.encode(), b"\ndata: ", document, b"\n\n"))
