"""Parse and answer vLLM's /tokenize and /detokenize. Knows nothing of text and tokens."""

from typing import Annotated

import msgspec
from pydantic import BaseModel, Field

from deployments.ingress.api.openai import ChatCompletionRequest
from deployments.ingress.api.openai_fields import MAX_PROMPT_TOKENS, Model

TokenIds = Annotated[list[int], Field(fail_fast=True, max_length=MAX_PROMPT_TOKENS)]


class TokenizeRequest(Model):
    """A text."""

    model: str = ""
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatCompletionRequest):
    """A chat, as it would be sent to be answered: only what changes its prompt matters."""

    model: str = ""
    return_token_strs: bool | None = None


class TokenizeInputsRequest(Model):
    """LoRAX's."""

    model: str = ""
    inputs: str
    add_special_tokens: bool | None = None


class DetokenizeRequest(Model):
    model: str = ""
    tokens: TokenIds


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(BaseModel):
    prompt: str


def write(fields: object) -> bytes:
    return msgspec.json.encode(fields)
