"""Parse requests of OpenAI's Responses API, and translate them into chats. Nothing is stored."""

# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from deployments.ingress.api.objects import read_object, unsupported, wrong
from deployments.ingress.api.openai import ChatCompletionRequest, Effort
from deployments.ingress.api.openai_fields import (
    Model,
    Nothing,
    Number,
    Priority,
    parse_request,
    short,
)
from deployments.ingress.api.responses_input import Input, input_names, without_oldest_turns
from engine.scheduler.request import MAX_LOGPROBS

LOGPROBS = "message.output_text.logprobs"

_NAMES = {
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "tool_choice.function": "tool_choice",
    "tool_choice.allowed_tools": "tool_choice",
}
_CHOICES = ("none", "auto", "required")
_TOOL = ("type", "name", "description", "parameters", "strict")


def _read_tools(value: object) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong("tools", f"must be a list, not {short(value)}")
    return [_tool(each, f"tools[{at}]") for at, each in enumerate(value)]


def _tool(value: object, path: str) -> dict[str, Any]:
    """Nest a function as chats do."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "function":
        raise unsupported(f"{path}.type", f"{short(kind)} is not supported, only 'function'")
    fields = dict(read_object(value, path, _TOOL))
    fields.pop("type")
    return {"type": "function", "function": fields}


def _read_choice(value: object) -> Any:
    """Nest a choice as chats do."""
    if isinstance(value, str) and value not in _CHOICES:
        raise wrong("tool_choice", f"must be one of {', '.join(_CHOICES)}, not {short(value)}")
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if kind == "function":
        return _named(value, "tool_choice")
    if kind != "allowed_tools":
        raise unsupported("tool_choice.type", f"{short(kind)} is not supported")
    fields = read_object(value, "tool_choice", ("type", "mode", "tools"))
    tools = fields.get("tools")
    if not isinstance(tools, list):
        raise wrong("tool_choice.tools", f"must be a list, not {short(tools)}")
    named = [_named(tool, f"tool_choice.tools[{at}]") for at, tool in enumerate(tools[:200])]
    return {"type": kind, "allowed_tools": {"mode": fields.get("mode", "auto"), "tools": named}}


def _named(value: object, path: str) -> dict[str, Any]:
    fields = read_object(value, path, ("type", "name"))
    if fields.get("type") != "function":
        raise unsupported(f"{path}.type", f"only 'function' is supported, not {fields.get('type')}")
    return {"type": "function", "function": {"name": fields.get("name")}}


def _read_format(value: object) -> Any:
    """Nest a format as chats do."""
    if not isinstance(value, dict) or value.get("type") != "json_schema":
        return value
    fields = dict(
        read_object(value, "text.format", ("type", "name", "schema", "strict", "description"))
    )
    fields.pop("type")
    return {"type": "json_schema", "json_schema": fields}


# Log probabilities, and what only those have that is never there: encrypted reasoning, images and
# the results of tools that run in the server.
_INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)


def _read_include(value: object) -> object:
    for at, each in enumerate(cast(list[Any], value) if isinstance(value, list) else []):
        if each not in _INCLUDABLE:
            raise unsupported(f"include[{at}]", f"{short(each)} is not supported")
    return value


Key = Annotated[str, StringConstraints(max_length=64)]
Value = Annotated[str, StringConstraints(max_length=512)]


class Text(Model):
    format: Annotated[
        dict[str, Any] | None,
        BeforeValidator(_read_format, json_schema_input_type=dict[str, Any] | None),
    ] = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Model):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # reasoning is shown whole
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class StreamOptions(Model):
    include_obfuscation: bool | None = None  # ignored: nothing is padded


class ResponsesRequest(Model):
    model: str
    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[
        list[Any],
        BeforeValidator(_read_tools, json_schema_input_type=list[dict[str, Any]] | None),
    ] = []  # noqa: RUF012
    tool_choice: Annotated[
        Any,
        BeforeValidator(
            _read_choice,
            json_schema_input_type=Literal["none", "auto", "required"] | dict[str, Any] | None,
        ),
    ] = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[str] | None, BeforeValidator(_read_include)] = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncation: Literal["disabled", "auto"] | None = None

    # Extras of vLLM's
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    seed: int | None = None
    cache_salt: str | None = None
    priority: Priority | None = None

    # Accepted and ignored: they do not change the tokens. Answers repeat those that have a type.
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    max_tool_calls: int | None = None  # of tools that run in the server: there are none
    store: Any = None  # nothing is stored: answers say so
    service_tier: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None

    # Refused unless they ask for what happens anyway.
    background: Literal[False] | None = None
    previous_response_id: Nothing = None
    conversation: Nothing = None
    prompt: Nothing = None
    context_management: Nothing = None
    moderation: Nothing = None

    @model_validator(mode="after")
    def _top_logprobs_are_included(self) -> "ResponsesRequest":
        if self.top_logprobs and not self.wants_logprobs:
            raise ValueError(f"top_logprobs: only allowed when include has {LOGPROBS!r}")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def num_turns(self) -> int:
        """Count the turns of the input, each of which begins with a user's message."""
        return sum(message.begins_turn for message in self.input)

    def without_oldest(self, num_turns: int) -> "ResponsesRequest":
        return self.model_copy(update={"input": without_oldest_turns(self.input, num_turns)})

    def chat(self) -> ChatCompletionRequest:
        """Translate into a chat. Raises ApiError, with a chat's names of fields."""
        document = {name: value for name, value in self._fields().items() if value is not None}
        return parse_request(ChatCompletionRequest, document)

    def names(self) -> dict[str, str]:
        names = {**_NAMES, **input_names(self.input, 1 if self.instructions else 0)}
        for at in range(len(self.tools)):
            names[f"tools[{at}].function"] = f"tools[{at}]"
        return names | ({"messages[0]": "instructions"} if self.instructions else {})

    def _fields(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        same = ("model", "temperature", "top_p", "stream", "tool_choice", "parallel_tool_calls")
        same = (*same, "user", "safety_identifier")
        extras = ("top_k", "min_p", "repetition_penalty", "seed", "cache_salt", "priority")
        return {
            **{name: getattr(self, name) for name in (*same, *extras)},
            "messages": [*system, *(message.document for message in self.input)],
            "max_tokens": self.max_output_tokens,
            "tools": self.tools or None,
            "response_format": None if self.text is None else self.text.format,
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
            "stream_options": {"include_usage": True} if self.stream else None,
            "logprobs": True if self.wants_logprobs else None,
            "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
        }
