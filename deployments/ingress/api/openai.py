"""Parse OpenAI's chat and completion requests. What they share is in `openai_request`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from adapter_store.chat_template import MAX_TEMPLATE_CHARS
from deployments.ingress.api.messages import Message, check_arguments
from deployments.ingress.api.openai_fields import Nothing, Prompts
from deployments.ingress.api.openai_request import OpenAIRequest
from deployments.ingress.api.tools import Choice, NoFunctionCall, NoFunctions, Tool, Tools
from engine.scheduler.request import MAX_LOGPROBS
from engine.validate import MAX_CHOICES

MAX_MESSAGES = 2048
MAX_DOCUMENTS = 1024
MAX_TEMPLATE_VALUES = 10_000  # in chat_template_kwargs, at any depth
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Modalities = Annotated[list[Literal["text"]], Field(fail_fast=True, max_length=8)]
Documents = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_DOCUMENTS)]
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own default for completions


class ChatCompletionRequest(OpenAIRequest):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    documents: Documents | None = None  # for templates that read them
    chat_template: str | None = Field(None, max_length=MAX_TEMPLATE_CHARS)

    tools: Tools = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None  # vLLM's

    # Refused unless they ask for what happens anyway.
    functions: NoFunctions = None
    function_call: NoFunctionCall = None
    audio: Nothing = None
    prediction: Nothing = None
    verbosity: None = None
    web_search_options: None = None
    modalities: Modalities | None = None

    @model_validator(mode="after")
    def _few_template_values(self) -> "ChatCompletionRequest":
        most = MAX_TEMPLATE_VALUES
        for name in ("chat_template_kwargs", "documents"):
            if _num_values(getattr(self, name), most) > most:
                raise ValueError(f"{name}: must have at most {most} values at all depths")
        return self

    @model_validator(mode="after")
    def _fields_that_belong_together(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: not allowed together with max_completion_tokens")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: not allowed with add_generation_prompt")
        return self

    @model_validator(mode="after")
    def _tools_that_may_be_called(self) -> "ChatCompletionRequest":
        check_arguments(self.messages)
        choice = self.tool_choice
        if choice is None:
            return self
        known = [tool.name for tool in self.tools or ()]
        if choice.is_forced and not known:
            raise ValueError("tool_choice: a call is only possible with tools")
        if choice.is_forced and self.ignore_eos:
            raise ValueError("ignore_eos: not allowed together with a forced tool_choice")
        for name in choice.names:
            if name not in known:
                raise ValueError(f"tool_choice: no tool is called {name!r}")
        return self

    @property
    def callable_tools(self) -> Sequence[Tool]:
        """The tools that the model is told about: unless a call is forced, those it may call."""
        choice = self.tool_choice
        if choice is None or choice.is_forced:
            return self.tools or []
        return [] if choice.mode == "none" else self.allowed_tools

    @property
    def allowed_tools(self) -> Sequence[Tool]:
        """The tools that may be called."""
        names = () if self.tool_choice is None else self.tool_choice.names
        return [tool for tool in self.tools or () if not names or tool.name in names]

    @property
    def has_forced_call(self) -> bool:
        return self.tool_choice is not None and self.tool_choice.is_forced

    @property
    def wanted_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(OpenAIRequest):
    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    add_special_tokens: bool | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _fields_that_belong_together(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.num_choices:
            raise ValueError(
                f"best_of: must be at least n ({self.num_choices}), not {self.best_of}"
            )
        if self.stream and self.num_generated > self.num_choices:
            raise ValueError(f"best_of: must equal n ({self.num_choices}) in a stream")
        if self.echo and self.truncate_prompt_tokens is not None:
            raise ValueError("truncate_prompt_tokens: not allowed together with echo")
        if self.max_tokens == 0 and (not self.echo or self.stream):
            raise ValueError("max_tokens: 0 is only allowed with echo and without stream")
        return self

    @property
    def num_generated(self) -> int:
        return self.num_choices if self.best_of is None else self.best_of

    @property
    def num_answers(self) -> int:
        return self.num_generated * len(self.prompt)

    @property
    def wanted_max_tokens(self) -> int | None:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        return max((k for k in (echoed, self.prompt_logprobs) if k is not None), default=None)


def _num_values(value: object, most: int) -> int:
    """Count the values inside a value, at any depth; stop above `most`."""
    waiting: list[object] = [value]
    num = 0
    while waiting and num <= most:
        value = waiting.pop()
        inner: list[object] = []
        if isinstance(value, dict):
            inner = list(cast(dict[str, object], value).values())
        elif isinstance(value, list):
            inner = cast(list[object], value)
        num += len(inner)
        waiting.extend(inner if num <= most else ())
    return num
