"""Read the input of OpenAI's Responses API, and translate it for chats.

What an assistant has said is several items there: reasoning, a message, calls. They become one
message of a chat.
"""

# Fields are JSON of any shape until they are checked here.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, SkipValidation

from deployments.ingress.api.messages import MAX_PARTS
from deployments.ingress.api.objects import read_object, read_text, unsupported, wrong
from deployments.ingress.api.openai_fields import short
from deployments.text.tools.call import NAME, is_name

MAX_ITEMS = 2048

_ROLES = ("user", "assistant", "system", "developer")
_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_KINDS = ("message", "function_call", "function_call_output", "reasoning")


@dataclass(frozen=True, slots=True)
class InputMessage:
    """A chat's message. `paths` maps its own places to those in the request."""

    document: dict[str, Any]
    path: str
    call_paths: list[str] = field(default_factory=list[str])

    @property
    def begins_turn(self) -> bool:
        return self.document["role"] == "user"

    @property
    def stays(self) -> bool:
        """Whether it steers the whole conversation."""
        return self.document["role"] in ("system", "developer")


def _read_input(value: object) -> list[InputMessage]:
    """Translate the input. Raises ApiError with the place of the first fault."""
    if isinstance(value, str):
        return [InputMessage({"role": "user", "content": value}, "input")]
    if not isinstance(value, list) or not value:
        raise wrong("input", f"must be text or a list of items, not {short(value)}")
    if len(value) > MAX_ITEMS:
        raise wrong("input", f"must have at most {MAX_ITEMS} items, not {len(value)}")
    messages: list[InputMessage] = []
    names: dict[str, str] = {}  # of tools, by the ids of their calls
    for at, item in enumerate(value):
        _take(messages, names, item, f"input[{at}]")
    return messages


def _take(messages: list[InputMessage], names: dict[str, str], item: object, path: str) -> None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if not isinstance(item, dict):
        raise wrong(path, f"must be an object, not {short(item)}")
    if kind not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise unsupported(f"{path}.type", f"{short(kind)} is not supported, only {known}")
    if kind == "function_call":
        _take_call(messages, names, item, path)
    elif kind == "function_call_output":
        messages.append(_output(names, item, path))
    elif kind == "reasoning":
        _take_reasoning(messages, item, path)
    else:
        _take_message(messages, item, path)


def _take_message(messages: list[InputMessage], item: object, path: str) -> None:
    fields = read_object(item, path, ("type", "role", "content", "id", "status", "phase"))
    role = fields.get("role")
    if role not in _ROLES:
        raise wrong(f"{path}.role", f"must be one of {', '.join(_ROLES)}, not {short(role)}")
    text = _text(fields.get("content"), f"{path}.content")
    if role != "assistant":
        messages.append(InputMessage({"role": role, "content": text}, path))
        return
    document = _answer(messages, path).document
    earlier = document.get("content")
    document["content"] = text if earlier is None else f"{earlier}\n{text}"


def _take_call(
    messages: list[InputMessage], names: dict[str, str], item: object, path: str
) -> None:
    known = ("type", "call_id", "name", "arguments", "id", "status")
    fields = read_object(item, path, known)
    name, call_id = fields.get("name"), read_text(fields, "call_id", path)
    if not is_name(name):
        raise wrong(f"{path}.name", f"must match ^{NAME}$, not be {short(name)}")
    names[call_id] = str(name)
    message = _answer(messages, path)
    function = {"name": name, "arguments": read_text(fields, "arguments", path)}
    calls = message.document.setdefault("tool_calls", [])
    calls.append({"id": call_id, "type": "function", "function": function})
    message.call_paths.append(path)


def _output(names: Mapping[str, str], item: object, path: str) -> InputMessage:
    fields = read_object(item, path, ("type", "call_id", "output", "id", "status", "name"))
    call_id = read_text(fields, "call_id", path)
    if call_id not in names:
        raise wrong(f"{path}.call_id", f"no function_call before it has the id {short(call_id)}")
    text = _text(fields.get("output"), f"{path}.output")
    ids = {"tool_call_id": call_id, "name": names[call_id]}
    return InputMessage({"role": "tool", "content": text, **ids}, path)


def _take_reasoning(messages: list[InputMessage], item: object, path: str) -> None:
    """Take the reasoning, or else its summary. What is encrypted nobody else can read."""
    known = ("type", "id", "status", "summary", "content", "encrypted_content")
    fields = read_object(item, path, known)
    name = "content" if fields.get("content") else "summary"
    text = _text(fields.get(name) or [], f"{path}.{name}")
    if text:
        _answer(messages, path, begins=True).document["reasoning_content"] = text


def _answer(messages: list[InputMessage], path: str, begins: bool = False) -> InputMessage:
    """Find the assistant's message that an item belongs to."""
    last = messages[-1] if messages else None
    is_open = last is not None and last.document["role"] == "assistant"
    if last is None or not is_open or (begins and len(last.document) > 1):
        last = InputMessage({"role": "assistant"}, path)
        messages.append(last)
    return last


def _text(value: object, path: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(path, f"must be text or a list of parts, not {short(value)}")
    if len(value) > MAX_PARTS:
        raise wrong(path, f"must have at most {MAX_PARTS} parts, not {len(value)}")
    return "\n".join(_part(part, f"{path}[{at}]") for at, part in enumerate(value))


def _part(value: object, path: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else value
    if kind not in _PARTS:
        raise unsupported(f"{path}.type", f"only text is supported, not {short(kind)}")
    known = ("type", "text", "annotations", "logprobs", "parsed", "prompt_cache_breakpoint")
    return read_text(read_object(value, path, known), "text", path)


def without_oldest_turns(messages: Sequence[InputMessage], num_turns: int) -> list[InputMessage]:
    """Drop what stands before a turn but for system messages, and results of calls in it."""
    begun = 0
    kept: list[InputMessage] = []
    ids: set[str] = set()
    for message in messages:
        begun += message.begins_turn
        is_result = message.document["role"] == "tool"
        if not message.stays and begun <= num_turns:
            continue
        if is_result and message.document["tool_call_id"] not in ids:
            continue
        ids |= {call["id"] for call in message.document.get("tool_calls", ())}
        kept.append(message)
    return kept


def input_names(messages: Sequence[InputMessage], offset: int) -> dict[str, str]:
    """Map the places of a chat's messages to those of the input."""
    names: dict[str, str] = {}
    for at, message in enumerate(messages, offset):
        names[f"messages[{at}]"] = message.path
        for number, path in enumerate(message.call_paths):
            names[f"messages[{at}].tool_calls[{number}].function"] = path
    return names


Input = Annotated[
    list[InputMessage],
    SkipValidation,
    BeforeValidator(_read_input, json_schema_input_type=str | list[dict[str, Any]]),
]
