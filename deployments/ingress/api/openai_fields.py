"""Types of request fields: what each accepts, how long it may be, and how errors are worded.

Every list stops at its first error and at its limit, so that the longest body costs little to
refuse.
"""

# Fields are JSON of any shape until they are checked here.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SkipValidation,
    ValidationError,
    model_validator,
)

from deployments.ingress.http_errors import ApiError, invalid
from engine.scheduler.request import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_LOGIT_BIASES,
    MAX_PRIORITY,
    MAX_STOP_TOKEN_IDS,
)

MAX_FIELDS = 256  # of one object
MAX_STOPS = 16
MAX_BIAS = 100.0
MAX_PROMPTS = 128
MAX_BAD_WORDS, MAX_BAD_WORD = 128, 256  # texts; characters of one
MAX_INPUTS = 2048  # of embeddings; OpenAI's own limit
MAX_PROMPT_TOKENS = 2**20  # token ids of all prompts of one request
MAX_MESSAGE = 400  # characters of an error's message

Ids = list[int]
RequestT = TypeVar("RequestT", bound=BaseModel)


class Model(BaseModel):
    """A JSON object. Unknown fields are refused by name, unless they are null or empty."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_unknown_fields(cls, value: object) -> object:
        """Keep the first unknown field that says something: one is enough to refuse it."""
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise ValueError(f"must have at most {MAX_FIELDS} fields, not {len(value)}")
        unknown = [name for name in value if name not in cls.model_fields]
        if not unknown:
            return value
        kept = next((name for name in unknown if not is_empty(value[name])), None)
        return {name: v for name, v in value.items() if name in cls.model_fields or name == kept}


def is_empty(value: object) -> bool:
    """Whether a value asks for nothing: null, or an empty text, list or object."""
    return value is None or value in ("", [], {})


def _nothing(value: object) -> object:
    return None if value in ("", []) else value


def _only(neutral: object, shape: Any, reason: str) -> BeforeValidator:
    """Take a field that is not supported at the value that changes nothing."""

    def check(value: object) -> object:
        if value is not None and value != neutral:
            raise ValueError(f"must be {neutral}, not {short(value)}: {reason}")
        return value

    return BeforeValidator(check, json_schema_input_type=shape)


def _bad_words(value: object) -> object:
    if not isinstance(value, list) or len(value) > MAX_BAD_WORDS:
        raise ValueError(f"must be a list of at most {MAX_BAD_WORDS} texts")
    for word in value:
        if not isinstance(word, str) or not 1 <= len(word.strip()) <= MAX_BAD_WORD:
            raise ValueError(
                f"must be texts of 1 to {MAX_BAD_WORD} characters that are not all white space"
            )
    return value


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be a finite number, not {value}")
    return value


def _stops(value: object) -> object:
    """Read one string or several. An empty one would end every answer before it begins."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise ValueError("must be a non-empty string or a list of non-empty strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"must have at most {MAX_STOPS} strings, not {len(stops)}")
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError("must be a non-empty string or a list of non-empty strings")
    return stops


def _prompts(value: object, most: int = MAX_PROMPTS) -> object:
    """Read text, texts, token ids or lists of them, as a list of texts or of token id lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be text, token ids, or a non-empty list of either")
    prompts = [value] if type(value[0]) is int else value
    if len(prompts) > most:
        raise ValueError(f"must have at most {most} prompts, not {len(prompts)}")
    if all(isinstance(prompt, str) for prompt in prompts):
        return prompts
    if all(isinstance(prompt, list) for prompt in prompts):
        num_tokens = sum(map(len, prompts))
        if num_tokens > MAX_PROMPT_TOKENS:
            raise ValueError(f"must have at most {MAX_PROMPT_TOKENS} token ids, not {num_tokens}")
        if all(set(map(type, prompt)) <= {int} for prompt in prompts):
            return prompts
    raise ValueError("must be text, token ids, or a list of either, not a mixture")


def _token_biases(value: object) -> object:
    if not isinstance(value, dict):
        raise ValueError("must be an object from token ids to numbers")
    if len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"must have at most {MAX_LOGIT_BIASES} tokens, not {len(value)}")
    return {_token_id(token): _bias(token, bias) for token, bias in value.items()}


def _token_id(text: object) -> int:
    digits = str(text)
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise ValueError(f"{short(text)} is not a token id")
    return int(digits)


def _bias(token: object, value: object) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"the bias of token {token} must be a number")
    assert isinstance(value, int | float)
    if not -MAX_BIAS <= value <= MAX_BIAS:  # of any size: not every int has a float
        raise ValueError(
            f"the bias of token {token} must be in [{-MAX_BIAS}, {MAX_BIAS}], not {short(value)}"
        )
    return float(value)


# What the API's document says of fields that are read in several shapes
StopsInput = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)]
)
_SOME = Field(min_length=1)
PromptsInput = (
    str | Annotated[list[str], _SOME] | Annotated[Ids, _SOME] | Annotated[list[Ids], _SOME]
)
BadWordsInput = Annotated[
    list[Annotated[str, Field(max_length=MAX_BAD_WORD, pattern=r"\S")]],
    Field(max_length=MAX_BAD_WORDS),
]
BiasesInput = Annotated[
    dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]],
    Field(max_length=MAX_LOGIT_BIASES),
]

Number = Annotated[float, BeforeValidator(_finite)]
Stops = Annotated[
    list[str], SkipValidation, BeforeValidator(_stops, json_schema_input_type=StopsInput)
]
StopTokenIds = Annotated[list[int], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)]
Prompts = Annotated[
    list[str] | list[Ids],
    SkipValidation,
    BeforeValidator(_prompts, json_schema_input_type=PromptsInput),
]
Inputs = Annotated[
    list[str] | list[Ids],
    SkipValidation,
    BeforeValidator(lambda value: _prompts(value, MAX_INPUTS), json_schema_input_type=PromptsInput),
]
Biases = Annotated[
    dict[int, float],
    SkipValidation,
    BeforeValidator(_token_biases, json_schema_input_type=BiasesInput),
]
BadWords = Annotated[
    list[str],
    SkipValidation,
    BeforeValidator(_bad_words, json_schema_input_type=BadWordsInput),
]
AllowedIds = Annotated[
    list[int], Field(fail_fast=True, min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS)
]
Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
LengthPenalty = Annotated[Any, _only(1, Literal[1] | None, "there is no beam search")]
NoBeams = Annotated[
    Any,
    _only(False, Literal[False] | None, "there is no beam search; best_of takes the likeliest"),
]
RequestId = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9._:/+=-]+$")]
Nothing = Annotated[None, BeforeValidator(_nothing)]  # a field that is not supported


# ---- errors --------------------------------------------------------------------------------


def parse_request(kind: type[RequestT], document: object) -> RequestT:
    """Check a request body. Raises ApiError with the path of the first field that is wrong."""
    if not isinstance(document, dict):
        raise invalid(f"The body must be a JSON object, not {type(document).__name__}.")
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise _as_api_error(error.errors(include_url=False)[0]) from None


def _as_api_error(error: Any) -> ApiError:
    path = _path(error["loc"])
    if error["type"] == "extra_forbidden":
        return invalid(f"Unknown field: {path}.", path, "unknown_field")
    if error["type"] == "none_required":
        return invalid(f"{path} is not supported.", path, "unsupported_field")
    message = str(error["msg"]).removeprefix("Value error, ")[:MAX_MESSAGE]
    if not path:  # a rule between fields names its field itself
        return invalid(message, message.split(":", 1)[0] if ": " in message else None)
    if error["type"] == "missing":
        return invalid(f"{path} is required.", path)
    got = "" if ", not " in message else f", not {short(error['input'])}"
    return invalid(f"{path}: {message}{got}.", path)


def _path(loc: tuple[str | int, ...]) -> str:
    """Write ('messages', 0, 'content') as messages[0].content."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:80]}" if text else part[:80]
    return text


def short(value: object) -> str:
    """Name a value in an error, at a cost that does not depend on its size."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:57]!r}..."
    if isinstance(value, int) and value.bit_length() > 256:
        return "an integer of so many digits"
    return repr(value)
