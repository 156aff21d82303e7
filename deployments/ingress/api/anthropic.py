"""Parse requests of Anthropic's Messages API, and translate them into chats."""

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from deployments.ingress.api.anthropic_messages import ChatMessage, System, Turns, chat_messages
from deployments.ingress.api.anthropic_tools import ClientTools, ToolUseChoice, tool_names
from deployments.ingress.api.objects import read_object, unsupported, wrong
from deployments.ingress.api.openai import ChatCompletionRequest
from deployments.ingress.api.openai_fields import (
    Model,
    Nothing,
    Number,
    Stops,
    parse_request,
    short,
)
from deployments.ingress.base_paths import as_fields

LEAST_BUDGET = 1024  # Anthropic's
# An edit of the context that asks for what happens anyway; some clients send it always.
_KEEPS_ALL = {"type": "clear_thinking_20251015", "keep": "all"}

# Where a chat's fields come from
_NAMES = {
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
    "response_format.json_schema": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}


def _format(value: object) -> object:
    """Read what the answer must match, as chats have it."""
    if value is None:
        return None
    fields = read_object(value, "output_config.format", ("type", "schema"))
    if fields.get("type") != "json_schema":
        kind = short(fields.get("type"))
        raise wrong("output_config.format.type", f"must be 'json_schema', not {kind}")
    schema = {"name": "answer", "schema": fields.get("schema")}
    return {"type": "json_schema", "json_schema": schema}


def _context_management(value: object) -> None:
    if value is None:
        return
    path = "context_management"
    edits: Any = read_object(value, path, ("edits",)).get("edits") or []
    if not isinstance(edits, list) or any(e != _KEEPS_ALL for e in cast(list[Any], edits)):
        raise unsupported(path, "nothing is left out of a context: send the messages that count")


class Thinking(Model):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=LEAST_BUDGET)
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _budget_of_the_type(self) -> "Thinking":
        if (self.budget_tokens is not None) != (self.type == "enabled"):
            raise ValueError("budget_tokens: belongs to the type 'enabled', which must have it")
        return self


class OutputConfig(Model):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Annotated[
        Any, BeforeValidator(_format, json_schema_input_type=dict[str, Any] | None)
    ] = None


class MessagesChat(ChatCompletionRequest):
    """The chat that a request becomes."""

    @property
    def is_cut_at_context(self) -> bool:
        return True


class PromptRequest(Model):
    """The fields that make the prompt: all that the counting of tokens takes."""

    model: str
    messages: Turns
    system: System = ""
    tools: ClientTools = Field(default_factory=list[dict[str, Any]])
    tool_choice: ToolUseChoice = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    # Accepted and ignored: they do not change the tokens.
    cache_control: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None

    # Refused unless they ask for what happens anyway.
    context_management: Annotated[
        None, BeforeValidator(_context_management, json_schema_input_type=dict[str, Any] | None)
    ] = None
    mcp_servers: Nothing = None
    speed: Literal["standard"] | None = None

    @property
    def wants_thinking(self) -> bool:
        return self.thinking is not None and self.thinking.type == "enabled"

    def chat(self) -> ChatCompletionRequest:
        """Translate into a chat. Raises ApiError, with a chat's names of fields."""
        document = {name: value for name, value in self._fields().items() if value is not None}
        return parse_request(MessagesChat, document)

    def names(self) -> dict[str, str]:
        """Map the names of a chat's fields to those of this request."""
        messages = {f"messages[{at}]": m.path for at, m in enumerate(self._messages())}
        return {**_NAMES, **self._thinking_names(), **tool_names(len(self.tools)), **messages}

    def _fields(self) -> dict[str, Any]:
        messages = [message.document for message in self._messages()]
        fields = {"model": self.model, "messages": messages, **self._thinking_fields()}
        fields["continue_final_message"] = self.messages[-1].role == "assistant" or None
        if self.output_config is not None:
            fields["response_format"] = self.output_config.format
        fields["tools"] = self.tools or None
        if self.tool_choice is not None:
            fields["tool_choice"] = self.tool_choice.choice
            fields["parallel_tool_calls"] = self.tool_choice.is_parallel
        return fields

    def _messages(self) -> list[ChatMessage]:
        system = ChatMessage("system", {"role": "system", "content": self.system})
        return [*([system] if self.system else []), *chat_messages(self.messages)]

    def _thinking_fields(self) -> dict[str, Any]:
        """Switch reasoning on or off, where the template has a switch."""
        kind = None if self.thinking is None else self.thinking.type
        if kind == "disabled":
            return {"reasoning_effort": "none"}
        effort = None if self.output_config is None else self.output_config.effort
        switch = None if kind is None else {"enable_thinking": True}
        return {"reasoning_effort": effort, "chat_template_kwargs": switch}

    def _thinking_names(self) -> dict[str, str]:
        is_off = self.thinking is not None and self.thinking.type == "disabled"
        return {"reasoning_effort": "thinking"} if is_off else {}


class MessagesRequest(PromptRequest):
    max_tokens: int
    stream: bool | None = None
    stop_sequences: Stops | None = None
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_p: Number | None = None
    top_k: int | None = None

    # Extras that this API does not have
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    seed: int | None = None
    cache_salt: str | None = None

    # Accepted and ignored: they do not change the tokens.
    metadata: Any = None
    service_tier: Any = None
    diagnostics: Any = None

    # Refused
    container: Nothing = None
    inference_geo: Nothing = None
    output_format: Nothing = None  # its successor is output_config.format

    @property
    def shows_thinking(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"

    def _fields(self) -> dict[str, Any]:
        same = ("max_tokens", "temperature", "top_p", "top_k", "stream")
        extras = ("min_p", "repetition_penalty", "seed", "cache_salt")
        return {
            **super()._fields(),
            **{name: getattr(self, name) for name in (*same, *extras)},
            "stop": self.stop_sequences,
            "user": as_fields(self.metadata).get("user_id"),
            "stream_options": {"include_usage": True} if self.stream else None,
            "include_reasoning": self.shows_thinking,
        }
