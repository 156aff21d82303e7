"""Find how a model calls tools, by rendering a call with its own chat template.

A format is taken if what the template writes of calls is read back as the same calls. Templates are
programs, and many of them leave calls, tools or results out without an error: that is found too.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.text.channels import ChannelParser
from deployments.text.chat_template import TemplateRefused
from deployments.text.tools.call import ToolCall
from deployments.text.tools.call_parser import CallParser
from deployments.text.tools.call_reader import Schemas
from deployments.text.tools.formats import FORMATS, ToolFormat
from deployments.text.tools.pattern import opening_of

LONG_ID, SHORT_ID = "call_0123456789abcdef01234567", "abcdefgh1"

JsonObject = Mapping[str, Any]
Render = Callable[[Sequence[JsonObject], bool, JsonObject], str]

_ASKED, _DESCRIBED, _RESULT = "How-many-probes-are-left?", "Counts-probes.", "Seventeen-probes."
_SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "description": "a text"},
        "n": {"type": "integer", "description": "a number"},
    },
    "required": ["text"],
}
_NAMES = ("probe_alpha", "probe_beta")
_SCHEMAS: Schemas = {name: _SCHEMA for name in _NAMES}  # noqa: C420 - a type of its own
_TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": _DESCRIBED, "parameters": _SCHEMA},
    }
    for name in _NAMES
]
_USER = {"role": "user", "content": _ASKED}
# Some templates keep the lines around a text, some cut them off.
_TEXTS = ('\nte"a\n', 'te"a')


@dataclass(frozen=True, slots=True)
class CallStyle:
    """What a template wants of messages with calls: whether content is a text, and short ids."""

    fills_content: bool = False
    has_short_ids: bool = False

    def messages(self, calls: Sequence[ToolCall]) -> list[JsonObject]:
        """Write a question and an answer that has these calls and no text."""
        content = {"content": ""} if self.fills_content else {}
        written = [_written_call(call, self._id(at)) for at, call in enumerate(calls)]
        return [_USER, {"role": "assistant", **content, "tool_calls": written}]

    def with_result(self, calls: Sequence[ToolCall]) -> list[JsonObject]:
        result = {"tool_call_id": self._id(0), "name": calls[0].name, "content": _RESULT}
        return [*self.messages(calls[:1]), {"role": "tool", **result}]

    def _id(self, at: int) -> str:
        return (SHORT_ID if self.has_short_ids else LONG_ID)[:-1] + str(at + 1)


@dataclass(frozen=True, slots=True)
class ToolSupport:
    """How tools are called. Without a format `refusal` says why they are not."""

    form: ToolFormat | None
    style: CallStyle = CallStyle()
    has_one_call: bool = False  # the template takes one call in a turn, and no more
    refusal: str = ""


_STYLES = [CallStyle(fills, short) for short in (False, True) for fills in (False, True)]


def probe_tools(render: Render) -> ToolSupport:
    """Find the format. `render` raises TemplateRefused."""
    refusal = "the chat template writes no calls"
    for style in _STYLES:
        for text in _TEXTS:
            try:
                return _probe(render, style, text)
            except TemplateRefused as error:
                refusal = str(error)
            except _Unknown as error:
                refusal = str(error)
    return ToolSupport(None, refusal=refusal)


class _Unknown(Exception):
    """What a template renders is of no use; the message says how."""


def _probe(render: Render, style: CallStyle, text: str) -> ToolSupport:
    calls = [ToolCall(name, json.dumps({"text": text, "n": 3})) for name in _NAMES]
    extra = {"tools": _TOOLS}
    rendered = render(style.messages(calls[:1]), False, extra)
    form = _find_format(render, rendered, calls[:1])
    if _DESCRIBED not in rendered:
        raise _Unknown("the chat template does not show tools to the model")
    if _RESULT not in render(style.with_result(calls), True, extra):
        raise _Unknown("the chat template does not show what a tool has returned")
    return ToolSupport(form, style, not _takes(render, style, form, calls))


def _find_format(render: Render, rendered: str, calls: Sequence[ToolCall]) -> ToolFormat:
    _, user, answer = rendered.rpartition(_ASKED)
    if not user:
        raise _Unknown("the chat template does not show the user's message")
    for form in FORMATS.values():
        if _parsed(form, answer if _has_marks(form) else _bare(render, answer)) == _meant(calls):
            return form
    if calls[0].name in answer:
        raise _Unknown("the chat template writes calls in a format that is not known")
    raise _Unknown("the chat template writes no calls")


def _takes(render: Render, style: CallStyle, form: ToolFormat, calls: Sequence[ToolCall]) -> bool:
    """Tell whether the template writes several calls in one turn."""
    try:
        rendered = render(style.messages(calls), False, {"tools": _TOOLS})
    except TemplateRefused:
        return False
    answer = rendered.rpartition(_ASKED)[2]
    answer = answer if _has_marks(form) else _bare(render, answer)
    return _parsed(form, answer) == _meant(calls)


def _has_marks(form: ToolFormat) -> bool:
    return form.has_channels or form.section is not None or bool(opening_of(form.call))


def _bare(render: Render, answer: str) -> str:
    """Cut off what opens the assistant's turn."""
    opened = render([_USER], True, {"tools": _TOOLS}).rpartition(_ASKED)[2]
    return answer.removeprefix(opened) if answer.startswith(opened) else ""


def _parsed(form: ToolFormat, answer: str) -> list[tuple[str, Any]]:
    parser = ChannelParser() if form.has_channels else CallParser(form, _SCHEMAS)
    pieces = parser.push(answer) + parser.flush()
    return _meant(piece for piece in pieces if isinstance(piece, ToolCall))


def _meant(calls: Sequence[ToolCall] | Iterator[ToolCall]) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


def _written_call(call: ToolCall, call_id: str) -> JsonObject:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": call_id, "type": "function", "function": function}
