"""Read the messages of Anthropic's API, and translate them for chats.

A message is a list of blocks. Results of tools come inside a user's message, where chats have
messages of their own for them.
"""

# Fields are JSON of any shape until they are checked here.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any

import msgspec
from pydantic import BeforeValidator, SkipValidation

from deployments.ingress.api.messages import MAX_PARTS
from deployments.ingress.api.objects import read_flag, read_object, read_text, unsupported, wrong
from deployments.ingress.api.openai_fields import is_empty, short
from deployments.ingress.http_errors import invalid
from deployments.text.tools.call import NAME, is_name

MAX_MESSAGES = 2048
ERROR = "Error: "  # before the text of a result with is_error, of which chats know nothing

_ROLES = ("user", "assistant", "system")


@dataclass(frozen=True, slots=True)
class Text:
    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Thinking:
    path: str
    text: str


@dataclass(frozen=True, slots=True)
class ToolUse:
    path: str
    use_id: str
    name: str
    arguments: str  # the text of a JSON object


@dataclass(frozen=True, slots=True)
class ToolResult:
    path: str
    use_id: str
    text: str


Block = Text | Thinking | ToolUse | ToolResult


@dataclass(frozen=True, slots=True)
class Turn:
    """A message. `path` is its place in the request."""

    path: str
    role: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A message as chats have it, and where it stood."""

    path: str
    document: Mapping[str, Any]


# ---- blocks --------------------------------------------------------------------------------


def read_texts(value: object, path: str) -> str:
    """Read text, or a list of text blocks, which become one line or more each."""
    if value is None or isinstance(value, str):
        return value or ""
    blocks = _list(value, path)
    return "\n".join(_text_block(block, f"{path}[{at}]") for at, block in enumerate(blocks))


def _text_block(value: object, path: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else value
    if kind != "text":
        raise unsupported(f"{path}.type", f"only 'text' is supported here, not {short(kind)}")
    return _text(read_object(value, path, ("type", "text", "cache_control")), path).text


def _text(fields: dict[str, Any], path: str) -> Text:
    return Text(path, read_text(fields, "text", path))


def _thinking(fields: dict[str, Any], path: str) -> Thinking:
    return Thinking(path, read_text(fields, "thinking", path))


def _redacted(fields: dict[str, Any], path: str) -> None:
    """Drop reasoning that only Anthropic's servers can read."""


def _tool_use(fields: dict[str, Any], path: str) -> ToolUse:
    name, arguments = fields.get("name"), fields.get("input")
    if not is_name(name):
        raise wrong(f"{path}.name", f"must match ^{NAME}$, not be {short(name)}")
    if not isinstance(arguments, dict):
        raise wrong(f"{path}.input", f"must be an object, not {short(arguments)}")
    caller = fields.get("caller")
    if not is_empty(caller) and caller != {"type": "direct"}:
        raise unsupported(f"{path}.caller", f"only direct calls are supported, not {short(caller)}")
    return ToolUse(
        path, read_text(fields, "id", path), str(name), _json(arguments, f"{path}.input")
    )


def _json(value: object, path: str) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (ValueError, RecursionError) as error:
        raise wrong(path, f"cannot be written as JSON: {str(error)[:200]}") from None


def _tool_result(fields: dict[str, Any], path: str) -> ToolResult:
    text = read_texts(fields.get("content"), f"{path}.content")
    if read_flag(fields, "is_error", path):
        text = ERROR + text
    return ToolResult(path, read_text(fields, "tool_use_id", path), text)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A type of blocks: in whose messages, with which fields, and how it is read."""

    roles: Sequence[str]
    fields: Sequence[str]
    read: Callable[[dict[str, Any], str], Block | None]


_KINDS = {
    "text": _Kind(_ROLES, ("text",), _text),
    "thinking": _Kind(("assistant",), ("thinking", "signature"), _thinking),
    "redacted_thinking": _Kind(("assistant",), ("data",), _redacted),
    "tool_use": _Kind(("assistant",), ("id", "name", "input", "caller"), _tool_use),
    "tool_result": _Kind(("user",), ("tool_use_id", "content", "is_error"), _tool_result),
}


def _block(value: object, path: str, role: str) -> Block | None:
    name = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(name, str):
        raise wrong(path, f"must be an object with a type, not {short(value)}")
    kind = _KINDS.get(name)
    if kind is None:
        known = ", ".join(map(repr, _KINDS))
        raise unsupported(f"{path}.type", f"{short(name)} is not supported, only {known}")
    if role not in kind.roles:
        raise wrong(f"{path}.type", f"messages of the role {role!r} have no {name!r}")
    return kind.read(read_object(value, path, ("type", "cache_control", *kind.fields)), path)


def _list(value: object, path: str) -> list[object]:
    if not isinstance(value, list):
        raise wrong(path, f"must be text or a list of blocks, not {short(value)}")
    if len(value) > MAX_PARTS:
        raise wrong(path, f"must have at most {MAX_PARTS} blocks, not {len(value)}")
    return value


# ---- messages ------------------------------------------------------------------------------


def _read_turns(value: object) -> list[Turn]:
    """Read all messages. Raises ApiError with the place of the first fault."""
    if not isinstance(value, list) or not value:
        raise invalid(f"messages: must be a list of messages, not {short(value)}.", "messages")
    if len(value) > MAX_MESSAGES:
        raise wrong("messages", f"must have at most {MAX_MESSAGES} messages, not {len(value)}")
    turns = [_turn(each, f"messages[{at}]") for at, each in enumerate(value)]
    _check_uses(turns)
    return turns


def _turn(value: object, path: str) -> Turn:
    fields = read_object(value, path, ("role", "content"))
    role, content = fields.get("role"), fields.get("content")
    if role not in _ROLES:
        raise wrong(f"{path}.role", f"must be one of {', '.join(_ROLES)}, not {short(role)}")
    path_inside = f"{path}.content"
    if isinstance(content, str):
        return Turn(path, str(role), [Text(path_inside, content)])
    blocks = [
        _block(each, f"{path_inside}[{at}]", str(role))
        for at, each in enumerate(_list(content, path_inside))
    ]
    return Turn(path, str(role), [block for block in blocks if block is not None])


def _check_uses(turns: Sequence[Turn]) -> None:
    """Refuse results of calls that nobody has made, and a last call without its result."""
    made: set[str] = set()
    for turn in turns:
        for block in turn.blocks:
            if isinstance(block, ToolUse):
                made.add(block.use_id)
            elif isinstance(block, ToolResult) and block.use_id not in made:
                path = f"{block.path}.tool_use_id"
                raise wrong(path, f"no tool_use before it has the id {short(block.use_id)}")
    last = next((block for block in turns[-1].blocks if isinstance(block, ToolUse)), None)
    if last is not None:
        raise wrong(last.path, "the last message cannot be a call: send its tool_result, too")


Turns = Annotated[
    list[Turn],
    SkipValidation,
    BeforeValidator(_read_turns, json_schema_input_type=list[dict[str, Any]]),
]
System = Annotated[
    str,
    BeforeValidator(
        lambda value: read_texts(value, "system"),
        json_schema_input_type=str | list[dict[str, Any]] | None,
    ),
]


# ---- translation ---------------------------------------------------------------------------


def chat_messages(turns: Sequence[Turn]) -> Iterator[ChatMessage]:
    """Translate messages. Those of one role that follow each other are one, as in this API."""
    names: dict[str, str] = {}  # of tools, by the ids of their calls
    for role, group in groupby(turns, key=lambda turn: turn.role):
        same = list(group)
        blocks = [block for turn in same for block in turn.blocks]
        names |= {block.use_id: block.name for block in blocks if isinstance(block, ToolUse)}
        if role == "assistant":
            yield _answer(same[0].path, blocks)
        else:
            yield from _said(role, same[0].path, blocks, names)


def _said(
    role: str, path: str, blocks: Sequence[Block], names: Mapping[str, str]
) -> Iterator[ChatMessage]:
    """Translate what is no answer: results of tools, and text."""
    for is_result, group in groupby(blocks, key=lambda block: isinstance(block, ToolResult)):
        same = list(group)
        if is_result:
            for block in same:
                assert isinstance(block, ToolResult)
                yield _result(block, names[block.use_id])
        else:
            yield ChatMessage(path, {"role": role, "content": _joined(same, Text)})
    if not blocks:
        yield ChatMessage(path, {"role": role, "content": ""})


def _result(block: ToolResult, name: str) -> ChatMessage:
    ids = {"tool_call_id": block.use_id, "name": name}
    return ChatMessage(block.path, {"role": "tool", "content": block.text, **ids})


def _answer(path: str, blocks: Sequence[Block]) -> ChatMessage:
    calls = [_call(block) for block in blocks if isinstance(block, ToolUse)]
    has_text = any(isinstance(block, Text) for block in blocks)
    document: dict[str, Any] = {"role": "assistant"}
    if has_text or not calls:
        document["content"] = _joined(blocks, Text)
    if thoughts := _joined(blocks, Thinking):
        document["reasoning_content"] = thoughts
    return ChatMessage(path, document | ({"tool_calls": calls} if calls else {}))


def _call(block: ToolUse) -> dict[str, Any]:
    function = {"name": block.name, "arguments": block.arguments}
    return {"id": block.use_id, "type": "function", "function": function}


def _joined(blocks: Sequence[Block], kind: type[Text | Thinking]) -> str:
    return "\n".join(block.text for block in blocks if isinstance(block, kind))
