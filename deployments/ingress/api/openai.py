"""Parse OpenAI's chat and completion requests, with vLLM's sampling extras.

A field that would change the result and is not implemented is refused; one that cannot change it
is accepted and ignored; an unknown one is refused by name. Knows nothing of text and tokens.
"""

import math
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from deployments.ingress.http_errors import ApiError, invalid
from engine.scheduler.request import (
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    NO_DEFAULTS,
    InvalidRequest,
    SamplingDefaults,
    SamplingParams,
)
from engine.validate import MAX_CHOICES

MAX_STOPS = 16
MAX_PROMPTS = 128
RANDOM_SEED = -1  # as in vLLM: of clients that cannot leave the field out
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own default for completions

Ids = list[int]
RequestT = TypeVar("RequestT", bound=BaseModel)


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be a finite number, not {value}")
    return value


def _stops(value: object) -> object:
    """Read one string or several. An empty one would end every answer before it begins."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise ValueError("must be a non-empty string or a list of non-empty strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"must have at most {MAX_STOPS} strings, not {len(stops)}")
    return stops


def _prompts(value: object) -> object:
    """Read text, texts, token ids or lists of them, as a list of texts or of token id lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be text, token ids, or a non-empty list of either")
    prompts = [value] if all(type(item) is int for item in value) else value
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"must have at most {MAX_PROMPTS} prompts, not {len(prompts)}")
    if all(isinstance(p, str) for p in prompts) or all(map(_is_ids, prompts)):
        return prompts
    raise ValueError("must be text, token ids, or a list of either, not a mixture")


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _few_ids(value: object) -> object:
    if isinstance(value, list) and len(value) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"must have at most {MAX_STOP_TOKEN_IDS} token ids, not {len(value)}")
    return value


def _token_biases(value: object) -> object:
    if not isinstance(value, dict):
        raise ValueError("must be an object from token ids to numbers")
    if len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"must have at most {MAX_LOGIT_BIASES} tokens, not {len(value)}")
    for token, bias in value.items():
        if not str(token).isascii() or not str(token).isdigit():
            raise ValueError(f"{token!r} is not a token id")
        if type(bias) not in (int, float):
            raise ValueError(f"the bias of token {token} must be a number")
    return {int(token): float(bias) for token, bias in value.items()}


Number = Annotated[float, BeforeValidator(_finite)]
Stops = Annotated[list[str], BeforeValidator(_stops)]
Prompts = Annotated[list[str] | list[Ids], BeforeValidator(_prompts)]
StopTokenIds = Annotated[list[int], BeforeValidator(_few_ids)]
Biases = Annotated[dict[int, float], BeforeValidator(_token_biases)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Model):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # ignored: nothing is padded


class OpenAIRequest(Model):
    """The fields that chats and completions share."""

    model: str
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stops | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    seed: int | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: Biases | None = None

    # vLLM's extras
    top_k: int | None = None
    min_p: Number | None = None
    min_tokens: int | None = None
    repetition_penalty: Number | None = None
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(None, max_length=1024)

    # Accepted and ignored: they do not change the tokens.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "OpenAIRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wanted_max_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        raise NotImplementedError

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        return None

    def sampling(
        self, max_tokens: int, seed: int, defaults: SamplingDefaults = NO_DEFAULTS
    ) -> SamplingParams:
        """Build sampling parameters, with `seed` if the client gave none. Raises ApiError."""
        biases = self.logit_bias or {}
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # -1 is off, as in vLLM
            "min_p": self.min_p,
            "min_tokens": self.min_tokens,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "ignore_eos": self.ignore_eos,
        }
        chosen = {**asdict(defaults), **{name: v for name, v in given.items() if v is not None}}
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                seed=seed if self.seed in (None, RANDOM_SEED) else self.seed,
                logit_bias=tuple(sorted(biases.items())),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                logprobs=self.wanted_logprobs,
                prompt_logprobs=self.wanted_prompt_logprobs,
                **cast(Any, {name: v for name, v in chosen.items() if v is not None}),
            )
        except InvalidRequest as error:
            raise invalid(str(error), param=str(error).split(" ", 1)[0]) from None


class TextPart(Model):
    type: Literal["text"]
    text: str


def _content(value: object) -> object:
    """Read text, or a list of text parts, which are joined."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be text or a list of text parts")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"only parts of the type 'text' are supported, not {kind!r}")
    return "".join(TextPart.model_validate(part).text for part in value)


class Message(Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | None, BeforeValidator(_content)] = None
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Any = None

    def document(self) -> dict[str, str]:
        """Write the message for chat templates. `developer` is OpenAI's newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content or ""}
        return message if self.name is None else {**message, "name": self.name}


class ChatCompletionRequest(OpenAIRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None

    # Refused unless they ask for what happens anyway.
    tools: None = None
    functions: None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None
    modalities: list[Literal["text"]] | None = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fields_that_belong_together(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        if self.response_format not in (None, {"type": "text"}):
            raise ValueError("response_format: only {'type': 'text'} is supported")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: not allowed together with max_completion_tokens")
        return self

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
    best_of: int | None = None
    add_special_tokens: bool | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _fields_that_belong_together(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError(f"best_of: must equal n ({self.num_choices}), not {self.best_of}")
        if self.max_tokens == 0 and (not self.echo or self.stream):
            raise ValueError("max_tokens: 0 is only allowed with echo and without stream")
        return self

    @property
    def wanted_max_tokens(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None


def parse_request(kind: type[RequestT], document: object) -> RequestT:
    """Check a request body. Raises ApiError with the path of the first field that is wrong."""
    if not isinstance(document, dict):
        raise invalid(f"The body must be a JSON object, not {type(document).__name__}.")
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise _as_api_error(error.errors()[0]) from None


def _as_api_error(error: Any) -> ApiError:
    path = _path(error["loc"])
    if error["type"] == "extra_forbidden":
        return invalid(f"Unknown field: {path}.", path, "unknown_field")
    if error["type"] == "none_required":
        return invalid(f"{path} is not supported.", path, "unsupported_field")
    message = str(error["msg"]).removeprefix("Value error, ")
    if not path:  # a rule between fields names its field itself
        return invalid(message, message.split(":", 1)[0])
    if error["type"] == "missing":
        return invalid(f"{path} is required.", path)
    return invalid(f"{path}: {message}, not {_short(error['input'])}.", path)


def _path(loc: tuple[str | int, ...]) -> str:
    """Write ('messages', 0, 'content') as messages[0].content."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
