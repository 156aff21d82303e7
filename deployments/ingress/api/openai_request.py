"""OpenAIRequest: the fields that OpenAI's chats and completions share, with vLLM's extras.

A field that would change the result and is not implemented is refused; one that cannot change it
is accepted and ignored; an unknown one is refused by name. Knows nothing of text and tokens.
"""

from dataclasses import asdict
from functools import cached_property
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from adapter_store.recipes import MAX_MEMBERS, MAX_WEIGHT
from deployments.ingress.api.openai_fields import (
    AllowedIds,
    BadWords,
    Biases,
    LengthPenalty,
    Model,
    NoBeams,
    Nothing,
    Number,
    Priority,
    RequestId,
    Stops,
    StopTokenIds,
)
from deployments.ingress.api.structured_fields import read_constraint
from deployments.ingress.http_errors import invalid
from deployments.ingress.model_names import AdapterSet
from deployments.ingress.structured.constraint import Constraint
from engine.scheduler.request import (
    MAX_LOGPROBS,
    NO_DEFAULTS,
    InvalidRequest,
    SamplingDefaults,
    SamplingParams,
)
from engine.validate import MAX_CHOICES

RANDOM_SEED = -1  # as in vLLM: of clients that cannot leave the field out


class StreamOptions(Model):
    include_usage: bool = False
    continuous_usage_stats: bool | None = None  # usage so far in every chunk
    include_obfuscation: bool | None = None  # ignored: nothing is padded


class WeightedAdapter(Model):
    model: str
    weight: Number = Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)


Adapters = Annotated[
    list[WeightedAdapter], Field(fail_fast=True, min_length=1, max_length=MAX_MEMBERS)
]


class OpenAIRequest(Model):
    """The fields that chats and completions share."""

    model: str
    adapters: Adapters | None = None  # ours: a weighted set of them, on the base `model`
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
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    bad_words: BadWords | None = None
    allowed_token_ids: AllowedIds | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    return_tokens_as_token_ids: bool | None = None
    request_id: RequestId | None = None
    priority_class: Literal["interactive", "standard", "batch"] | None = None  # ours
    priority: Priority | None = None  # lower ones go first among the tenant's that wait
    length_penalty: LengthPenalty = None
    use_beam_search: NoBeams = None
    spaces_between_special_tokens: bool | None = None  # only slow tokenizers have them

    # What the answer must match; one of them
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: Nothing = None

    # Accepted and ignored: they do not change the tokens.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None  # changes where a request goes
    prompt_cache_retention: Any = None
    guided_decoding_backend: Any = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "OpenAIRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self

    @model_validator(mode="after")
    def _one_constraint(self) -> "OpenAIRequest":
        if self.constraint is not None and self.ignore_eos:
            raise ValueError(f"ignore_eos: not allowed together with {self.constraint.path}")
        return self

    @model_validator(mode="after")
    def _extras_that_exclude_others(self) -> "OpenAIRequest":
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: not allowed in a stream")
        if self.constraint is not None and self.allowed_token_ids is not None:
            raise ValueError(f"allowed_token_ids: not allowed with {self.constraint.path}")
        return self

    @cached_property
    def constraint(self) -> Constraint | None:
        """What the answer must match. Raises ValueError."""
        return read_constraint(
            self.response_format,
            self.structured_outputs,
            {
                "json": self.guided_json,
                "regex": self.guided_regex,
                "choice": self.guided_choice,
                "grammar": self.guided_grammar,
            },
        )

    @property
    def adapter_set(self) -> AdapterSet | None:
        """The adapters to combine, if they are not what `model` names."""
        if self.adapters is None:
            return None
        return AdapterSet([(each.model, each.weight) for each in self.adapters], self.model)

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def num_generated(self) -> int:
        """Count the answers that are generated for a prompt, of which some may be dropped."""
        return self.num_choices

    @property
    def num_answers(self) -> int:
        """Count the answers of all prompts: each is a generation of its own."""
        return self.num_generated

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def include_usage_so_far(self) -> bool:
        options = self.stream_options
        return options is not None and self.include_usage and bool(options.continuous_usage_stats)

    @property
    def wanted_max_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def is_cut_at_context(self) -> bool:
        """Whether an answer may be shorter than max_tokens where the context leaves less."""
        return False

    @property
    def wanted_logprobs(self) -> int | None:
        raise NotImplementedError

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs

    def sampling(
        self, max_tokens: int, seed: int, defaults: SamplingDefaults = NO_DEFAULTS
    ) -> SamplingParams:
        """Build sampling parameters, with `seed` if the client gave none. Raises ApiError.

        A top_k of -1 is off, as in vLLM. A top_p of 0 leaves the likeliest token alone.
        """
        biases = self.logit_bias or {}
        given = {
            "temperature": self.temperature,
            "top_p": 1.0 if self.top_p == 0 else self.top_p,
            "top_k": 1 if self.top_p == 0 else 0 if self.top_k == -1 else self.top_k,
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
                allowed_token_ids=_tuple_or_none(self.allowed_token_ids),
                logprobs=self.wanted_logprobs,
                prompt_logprobs=self.wanted_prompt_logprobs,
                **cast(Any, {name: v for name, v in chosen.items() if v is not None}),
            )
        except InvalidRequest as error:
            raise invalid(str(error), param=str(error).split(" ", 1)[0]) from None


def _tuple_or_none(token_ids: list[int] | None) -> tuple[int, ...] | None:
    return None if token_ids is None else tuple(token_ids)
