"""Parse LoRAX's requests, and translate them into completions.

A prompt is taken as it is, without a chat template. Without `do_sample`, and without a temperature,
top_k or top_p that say otherwise, an answer is greedy, whatever the model's folder suggests.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from adapter_store.recipes import MAX_MEMBERS, MajoritySign
from deployments.ingress.api.embeddings import EmbeddingRequest
from deployments.ingress.api.openai import CompletionRequest
from deployments.ingress.api.openai_fields import Model, Nothing, Number, Stops, parse_request
from deployments.ingress.base_paths import as_fields, name_within
from deployments.ingress.http_errors import invalid
from deployments.ingress.model_names import AdapterSet
from engine.scheduler.request import (
    MAX_LOGPROBS,
    NO_DEFAULTS,
    SamplingDefaults,
    SamplingParams,
)
from engine.validate import MAX_CHOICES

Source = Literal["local", "s3", "hub", "pbase"]
Strategy = Literal["linear", "ties", "dare_linear", "dare_ties"]
OWN_SOURCES = ("local", "s3")
NUM_SEEDS = 2**64


def _no_stops(value: object) -> object:
    return None if value == [] else value


def _off(value: object) -> object:
    if value is True:
        raise ValueError("is not supported")
    return value


Off = Annotated[bool | None, BeforeValidator(_off)]


def check_source(source: Source | None) -> None:
    """Refuse adapters from elsewhere. Raises ValueError."""
    if source not in (None, *OWN_SOURCES):
        raise ValueError(
            f"adapter_source: must be 'local' or 's3', not {source!r}: adapters are served from "
            "the adapter store, publish it there"
        )


class MergedAdapters(Model):
    """Adapters that are merged into one. `density` is of the strategies that prune."""

    ids: list[str] = Field(min_length=1, max_length=MAX_MEMBERS)
    weights: list[Number] = Field(max_length=MAX_MEMBERS)
    merge_strategy: Strategy | None = None
    density: Number | None = Field(None, ge=0.0, le=1.0)
    majority_sign_method: MajoritySign | None = None

    @model_validator(mode="after")
    def _fields_that_belong_together(self) -> "MergedAdapters":
        if len(self.ids) != len(self.weights):
            raise ValueError(f"must have as many weights as ids, {len(self.ids)}")
        return self

    def as_set(self, base: str | None) -> AdapterSet:
        return AdapterSet(
            list(zip(self.ids, self.weights, strict=True)),
            base,
            self.merge_strategy or "linear",
            self.density or 0.0,
            self.majority_sign_method or "total",
        )


class LoraxParameters(Model):
    """Fields are LoRAX's; null is the same as to leave one out."""

    adapter_id: str | None = None
    adapter_source: Source | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = None  # a key, for clients that send no header
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: Number | None = Field(None, ge=0.0, le=100.0)
    repetition_penalty: Number | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    top_k: int | None = Field(None, ge=1)
    top_p: Number | None = Field(None, gt=0.0, le=1.0)
    typical_p: Number | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = Field(None, ge=1)
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    stop: Annotated[Stops | None, BeforeValidator(_no_stops)] = None
    truncate: int | None = Field(None, ge=1)
    watermark: Off = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: int | None = Field(None, ge=1, le=MAX_LOGPROBS)
    apply_chat_template: Off = None
    seed: int | None = Field(None, ge=0, lt=NUM_SEEDS)
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fields_that_belong_together(self) -> "LoraxParameters":
        if self.typical_p not in (None, 1.0):
            raise ValueError("typical_p: is not supported unless it is 1, use top_p or min_p")
        if self.adapter_id and self.merged_adapters is not None:
            raise ValueError("merged_adapters: not allowed together with adapter_id")
        if self.adapter_ids:
            check_source(self.adapter_source)
        if self.num_answers > 1 and not self.is_sampled:
            raise ValueError("best_of: all answers would be alike without do_sample")
        return self

    @property
    def adapter_ids(self) -> list[str]:
        if self.merged_adapters is not None:
            return self.merged_adapters.ids
        return [self.adapter_id] if self.adapter_id else []

    @property
    def num_answers(self) -> int:
        return self.best_of or 1

    @property
    def is_sampled(self) -> bool:
        if self.temperature == 0.0:
            return False
        has_filter = self.top_k is not None or self.top_p not in (None, 1.0)
        return bool(self.do_sample) or has_filter or self.temperature not in (None, 1.0)

    @property
    def wants_details(self) -> bool:
        return bool(self.details or self.decoder_input_details)


class LoraxRequest(Model):
    model: str | None = None  # of a path below a base's id
    inputs: str = Field(min_length=1)
    parameters: LoraxParameters | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _fields_that_belong_together(self) -> "LoraxRequest":
        if self.stream and self.asked.num_answers > 1:
            raise ValueError("parameters.best_of: must be 1 in a stream")
        if self.stream and self.asked.decoder_input_details:
            raise ValueError("parameters.decoder_input_details: not allowed in a stream")
        return self

    @property
    def adapter_set(self) -> AdapterSet | None:
        merged = self.asked.merged_adapters
        return None if merged is None else merged.as_set(self.model)

    def model_name(self, base: str) -> str:
        """Name the adapter or base that is asked for. `base` is that of requests without one."""
        if self.adapter_set is not None:
            return self.adapter_set.text
        if not self.asked.adapter_id:
            return self.model or base
        return name_within(self.model, self.asked.adapter_id)

    @property
    def asked(self) -> LoraxParameters:
        return self.parameters or LoraxParameters.model_validate({})


class LoraxEmbedParameters(Model):
    adapter_id: str | None = None
    adapter_source: Source | None = None
    merged_adapters: Nothing = None
    api_token: str | None = None

    @model_validator(mode="after")
    def _own_source(self) -> "LoraxEmbedParameters":
        if self.adapter_id:
            check_source(self.adapter_source)
        return self


class LoraxEmbedRequest(Model):
    model: str | None = None  # of a path below a base's id
    inputs: str = Field(min_length=1)
    parameters: LoraxEmbedParameters | None = None
    stream: Literal[False] | None = None

    def as_embedding(self, base: str) -> EmbeddingRequest:
        """Translate a request. `base` is that of requests without a model. Raises ApiError."""
        adapter_id = None if self.parameters is None else self.parameters.adapter_id
        name = name_within(self.model, adapter_id) if adapter_id else self.model or base
        return parse_request(EmbeddingRequest, {"model": name, "input": self.inputs})


class LoraxVector(BaseModel):
    embeddings: list[float]


class LoraxAnswer(BaseModel):
    generated_text: str
    details: dict[str, Any] | None = None


class LoraxCompletion(CompletionRequest):
    """A completion that may be as long as the context."""

    merged: AdapterSet | None = None

    @property
    def adapter_set(self) -> AdapterSet | None:
        return self.merged

    @property
    def wanted_max_tokens(self) -> int | None:
        return self.max_tokens

    def sampling(
        self, max_tokens: int, seed: int, defaults: SamplingDefaults = NO_DEFAULTS
    ) -> SamplingParams:
        """Use the given seed whatever it is: -1 is one of them."""
        sampling = super().sampling(max_tokens, seed, defaults)
        return sampling if self.seed is None else replace(sampling, seed=self.seed)


def parse_lorax(document: object, stream: bool | None) -> LoraxRequest:
    """Check a body. `stream` is what the route gives; None if the body may choose.

    Raises ApiError.
    """
    if stream is not None and isinstance(document, dict):
        fields = as_fields(cast(object, document))
        if fields.get("stream") not in (None, stream):
            where = "/generate" if stream else "/generate_stream"
            raise invalid(f"stream: must be {str(stream).lower()} here, or ask {where}.", "stream")
        document = {**fields, "stream": stream}
    return parse_request(LoraxRequest, document)


def as_completion(request: LoraxRequest, base: str, seed: int) -> LoraxCompletion:
    """Translate a request, with the seed to use. Raises ApiError."""
    asked = request.asked
    penalty = asked.repetition_penalty
    has_tokens = bool(request.stream) or asked.wants_details or asked.num_answers > 1
    return parse_request(
        LoraxCompletion,
        {
            "model": request.model_name(base),
            "merged": request.adapter_set,
            "prompt": request.inputs,
            "truncate_prompt_tokens": asked.truncate,
            "max_tokens": asked.max_new_tokens,
            "n": asked.num_answers,
            "stream": request.stream,
            "stop": asked.stop,
            "include_stop_str_in_output": True,
            "temperature": (asked.temperature or 1.0) if asked.is_sampled else 0.0,
            "top_k": asked.top_k or 0,
            "top_p": asked.top_p or 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0 if penalty is None else penalty,
            "presence_penalty": asked.presence_penalty or 0.0,
            "frequency_penalty": asked.frequency_penalty or 0.0,
            "seed": seed if seed < NUM_SEEDS // 2 else seed - NUM_SEEDS,
            "ignore_eos": asked.ignore_eos_token,
            "logprobs": (asked.return_k_alternatives or 0) if has_tokens else None,
            "prompt_logprobs": 0 if asked.decoder_input_details else None,
            "response_format": asked.response_format,
        },
    )
