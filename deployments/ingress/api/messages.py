"""Parse the messages of chats: text only, whole or in parts, and calls of tools."""

# Fields are JSON of any shape until they are checked here.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, cast

import msgspec
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from deployments.ingress.api.openai_fields import Model, Nothing, is_empty, short
from deployments.ingress.http_errors import invalid
from deployments.text.tools.call import NAME

MAX_PARTS = 1024  # of one message
MAX_CALLS = 128  # of one message
MAX_ARGUMENT_VALUES = 50_000  # objects, lists and commas in the arguments of all calls

_PART_FIELDS = ("type", "text", "cache_control")  # a hint to caches changes no answer
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)


class TextPart(BaseModel):
    """One part of a message, as the API's document shows it."""

    type: Literal["text"]
    text: str
    cache_control: Any = None


def _content(value: object) -> object:
    """Read text, or a list of text parts, which become one line or more each."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be text or a list of text parts")
    if len(value) > MAX_PARTS:
        raise ValueError(f"must have at most {MAX_PARTS} parts, not {len(value)}")
    return "\n".join(map(_part_text, value))


def _part_text(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else part
    if not isinstance(part, dict) or kind != "text":
        raise ValueError(f"only parts of the type 'text' are supported, not {short(kind)}")
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"the text of a part must be a string, not {short(text)}")
    for name, setting in part.items():
        if name not in _PART_FIELDS and not is_empty(setting):
            raise ValueError(f"a text part has the unknown field {short(name)}")
    return text


class CalledFunction(Model):
    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    arguments: str = "{}"
    parsed_arguments: Any = None  # what OpenAI's client made of them, and sends back with them

    def document(self) -> dict[str, Any]:
        """Write the call for chat templates, which take an object where the API has its text."""
        return {"name": self.name, "arguments": self.read_arguments()}

    def read_arguments(self) -> dict[str, Any]:
        """Decode the arguments. Raises ValueError."""
        value: object = msgspec.json.decode(self.arguments or "{}")
        if not isinstance(value, dict):
            raise ValueError(f"it is {short(value)}")
        return cast("dict[str, Any]", value)


class MessageCall(Model):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None
    index: Any = None  # as in the chunks that it was put together from

    def document(self) -> dict[str, Any]:
        named = {} if self.id is None else {"id": self.id}
        return {**named, "type": "function", "function": self.function.document()}


class Message(Model):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | None, BeforeValidator(_content, json_schema_input_type=str | list[TextPart] | None)
    ] = None
    name: str | None = None
    reasoning_content: str | None = None  # as in answers
    reasoning: str | None = None  # the same, as vLLM names it
    refusal: Nothing = None
    tool_calls: Annotated[list[MessageCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = (
        None
    )
    tool_call_id: str | None = None
    function_call: Nothing = None
    audio: Nothing = None
    annotations: Any = None
    id: Any = None
    parsed: Any = None  # what OpenAI's client made of the content, and sends back with it

    @model_validator(mode="after")
    def _fields_of_the_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only the role 'assistant' has tool_calls, not {self.role!r}")
        if self.tool_call_id and self.role != "tool":
            raise ValueError(f"only the role 'tool' has a tool_call_id, not {self.role!r}")
        return self

    @property
    def uses_tools(self) -> bool:
        return bool(self.tool_calls) or self.role == "tool"

    @property
    def arguments(self) -> list[str]:
        return [call.function.arguments for call in self.tool_calls or ()]

    def document(self, fills_content: bool = True) -> dict[str, Any]:
        """Write the message for chat templates. `developer` is OpenAI's newer word for `system`.

        A message with calls and without content has none, unless the template wants text there.
        """
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        if self.content is not None or fills_content or not self.tool_calls:
            message["content"] = self.content or ""
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        extras = {"name": self.name, "tool_call_id": self.tool_call_id}
        # Two names, as transformers gives them to templates.
        extras |= {"reasoning_content": reasoning, "thinking": reasoning}
        if self.tool_calls:
            message["tool_calls"] = [call.document() for call in self.tool_calls]
        return message | {name: value for name, value in extras.items() if value is not None}


def check_arguments(messages: Sequence[Message]) -> None:
    """Refuse arguments that are no JSON objects, or so many that they are slow to handle.

    Raises ApiError with their place.
    """
    places = list(_arguments(messages))
    if sum(_num_values(text) for _, text, _ in places) > MAX_ARGUMENT_VALUES:
        raise invalid(
            f"messages: the arguments of all calls must have at most {MAX_ARGUMENT_VALUES} values.",
            "messages",
        )
    for path, _, function in places:
        try:
            function.read_arguments()
        except (ValueError, RecursionError) as error:
            message = f"{path}: must be the text of a JSON object: {str(error)[:200]}."
            raise invalid(message, path) from None


def _arguments(messages: Sequence[Message]) -> Iterator[tuple[str, str, CalledFunction]]:
    for at, message in enumerate(messages):
        for number, call in enumerate(message.tool_calls or ()):
            path = f"messages[{at}].tool_calls[{number}].function.arguments"
            yield path, call.function.arguments, call.function


def _num_values(text: str) -> int:
    """Count values by what stands before them. In long arguments texts are left out first."""
    num = sum(map(text.count, "[{,"))
    return num if num < 1000 else sum(map(_STRING.sub("", text).count, "[{,"))
