"""Write answers as OpenAI's Responses API does: whole responses and streams of events."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from deployments.ingress.api.block_reply import BlockReply, Kind, num_reasoning_tokens
from deployments.ingress.api.openai_replies import ReplyHead, TokenWriter
from deployments.ingress.api.reply import Usage
from deployments.ingress.choice import Choice
from deployments.ingress.error_form import ErrorForm
from deployments.ingress.http_errors import ApiError
from deployments.text.deltas import Delta, Reasoning
from deployments.text.tools.call import ToolCall

Item = dict[str, Any]


class ResponsesReply(BlockReply):
    """`echoed` are the fields of the request that an answer repeats.

    `tokens` writes log probabilities; those of the open item's text gather until it ends.
    """

    def __init__(
        self,
        head: ReplyHead,
        new_call_id: Callable[[], str],
        echoed: dict[str, Any],
        tokens: TokenWriter,
    ) -> None:
        super().__init__()
        self._head = head
        self._tokens = tokens
        self._new_call_id = new_call_id
        self._echoed = echoed
        self._number = 0
        self._items: list[Item] = []  # that have ended
        self._text: list[str] = []  # of the open item
        self._logprobs: list[Item] = []  # of its tokens
        self._ended: Choice | None = None

    # ---- streams -------------------------------------------------------------------------

    def begin(self, usage: Usage) -> bytes:
        response = self._response([], "in_progress", None, None)
        created = self._event("response.created", response=response)
        return created + self._event("response.in_progress", response=response)

    def closing(self, choice: Choice) -> bytes:
        self._ended = choice
        events = super().closing(choice)
        if self._items:
            return events
        return events + self._start("text") + self._end("text")

    def ending(self, usage: Usage | None) -> bytes:
        assert usage is not None and self._ended is not None, "the request asks for the usage"
        status = _status(self._ended)
        response = self._response(self._items, status, usage, self._ended)
        return self._event(f"response.{status}", response=response)

    def failing(self, error: ApiError, form: ErrorForm) -> bytes:
        """Write the error, and the response that has failed."""
        fields = {"code": error.code, "message": error.message, "param": error.param}
        said = self._event("error", **fields)
        response = self._response(self._items, "failed", None, None)
        response["error"] = {"code": "server_error", "message": error.message}
        return said + self._event("response.failed", response=response)

    def _start(self, kind: Kind) -> bytes:
        self._text, self._logprobs = [], []
        item = self._item(kind, None)
        added = self._event("response.output_item.added", output_index=len(self._items), item=item)
        part = _part(kind, "")
        return added + self._event("response.content_part.added", **self._place(kind), part=part)

    def _grow(self, kind: Kind, text: str, choice: Choice) -> bytes:
        self._text.append(text)
        new = self._logprobs_of(text, choice) if kind == "text" else []
        self._logprobs += new
        more = {"logprobs": _without_bytes(new)} if kind == "text" else {}
        return self._event(f"{_prefix(kind)}.delta", **self._place(kind), delta=text, **more)

    def _end(self, kind: Kind) -> bytes:
        text, logprobs = "".join(self._text), self._logprobs
        more = {"logprobs": _without_bytes(logprobs)} if kind == "text" else {}
        place = self._place(kind)
        item = self._item(kind, text, self._ended, logprobs)
        [part] = item["content"]
        events = (
            self._event(f"{_prefix(kind)}.done", **place, text=text, **more),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=place["output_index"], item=item),
        )
        self._items.append(item)
        return b"".join(events)

    def _call(self, call: ToolCall) -> bytes:
        index = len(self._items)
        item = self._call_item(call)
        begun = {**item, "arguments": "", "status": "in_progress"}
        place = {"item_id": item["id"], "output_index": index}
        done = "response.function_call_arguments.done"
        events = (
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event("response.function_call_arguments.delta", **place, delta=call.arguments),
            self._event(done, **place, name=call.name, arguments=call.arguments),
            self._event("response.output_item.done", output_index=index, item=item),
        )
        self._items.append(item)
        return b"".join(events)

    def _place(self, kind: Kind) -> dict[str, Any]:
        index = len(self._items)
        return {"item_id": self._id(kind, index), "output_index": index, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._number
        self._number += 1
        return _event(kind, {"sequence_number": number, **fields})

    # ---- whole answers -------------------------------------------------------------------

    def whole(self, choices: Sequence[Choice], texts: Sequence[str], usage: Usage) -> bytes:
        [choice], [text] = choices, texts
        *begun, last = self._blocks(choice, text) or [""]
        for block in begun:
            self._items.append(self._block(block, choice))
        self._items.append(self._block(last, choice, choice))
        return msgspec.json.encode(self._response(self._items, _status(choice), usage, choice))

    def _block(self, block: Delta, choice: Choice, ended: Choice | None = None) -> Item:
        if isinstance(block, ToolCall):
            return self._call_item(block)
        if isinstance(block, Reasoning):
            return self._item("reasoning", block.text, ended)
        return self._item("text", block, ended, self._logprobs_of(block, choice))

    # ---- both ----------------------------------------------------------------------------

    def _response(
        self, items: Sequence[Item], status: str, usage: Usage | None, choice: Choice | None
    ) -> dict[str, Any]:
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        num_reasoning = 0 if choice is None else num_reasoning_tokens(choice)
        return {
            "id": self._head.reply_id,
            "object": "response",
            "created_at": self._head.created,
            "model": self._head.model,
            "status": status,
            "error": None,
            "incomplete_details": details,
            "output": items,
            "usage": None if usage is None else _usage(usage, num_reasoning),
            **self._echoed,
        }

    def _id(self, kind: Kind, index: int) -> str:
        prefix = "msg" if kind == "text" else "rs"
        return f"{prefix}_{self._head.reply_id.removeprefix('resp_')}_{index}"

    def _logprobs_of(self, text: str, choice: Choice) -> list[Item]:
        if not self._head.has_logprobs:
            return []
        return [self._tokens.entry(entry) for entry in choice.take_text_entries(len(text))]

    def _item(
        self,
        kind: Kind,
        text: str | None,
        ended: Choice | None = None,
        logprobs: Sequence[Item] = (),
    ) -> Item:
        """Write an item; without text one that begins. Only the last one may be cut off."""
        is_cut = ended is not None and ended.finish_reason == "length"
        status = "in_progress" if text is None else "incomplete" if is_cut else "completed"
        content = [] if text is None else [_part(kind, text, logprobs)]
        head = {"id": self._id(kind, len(self._items)), "status": status, "content": content}
        if kind == "text":
            return {"type": "message", "role": "assistant", **head}
        return {"type": "reasoning", "summary": [], **head}

    def _call_item(self, call: ToolCall) -> Item:
        call_id = self._new_call_id()
        fields = {"id": f"fc_{call_id.removeprefix('call_')}", "call_id": call_id}
        said = {"name": call.name, "arguments": call.arguments}
        return {"type": "function_call", "status": "completed", **fields, **said}


def _part(kind: Kind, text: str, logprobs: Sequence[Item] = ()) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _without_bytes(logprobs: Sequence[Item]) -> list[Item]:
    """Write log probabilities as events have them."""
    return [
        {
            "token": each["token"],
            "logprob": each["logprob"],
            "top_logprobs": [
                {"token": top["token"], "logprob": top["logprob"]} for top in each["top_logprobs"]
            ],
        }
        for each in logprobs
    ]


def _prefix(kind: Kind) -> str:
    return "response.output_text" if kind == "text" else "response.reasoning_text"


def _status(choice: Choice) -> str:
    return "incomplete" if choice.finish_reason == "length" else "completed"


def _usage(usage: Usage, num_reasoning: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.num_cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": num_reasoning},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    document = msgspec.json.encode({"type": kind, **fields})
    return b"".join((b"event: ", kind.encode(), b"\ndata: ", document, b"\n\n"))
