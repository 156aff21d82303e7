"""The shapes of OpenAI's answers, for the API's document. The writers are in `openai_replies`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """More fields may come, as some requests ask for them."""

    model_config = ConfigDict(extra="allow")


class CachedTokens(Answer):
    cached_tokens: int


class DraftedTokens(Answer):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageAnswer(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: DraftedTokens


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None


class ChoiceAnswer(Answer):
    index: int
    logprobs: dict[str, Any] | None
    finish_reason: str
    stop_reason: str | int | None


class ChatChoice(ChoiceAnswer):
    message: ChatMessage


class TextChoice(ChoiceAnswer):
    text: str


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageAnswer


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # numbers, or base64 of their bytes


class TokenCounts(Answer):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: TokenCounts


class Proof(Answer):
    """Whether an engine has seen an adapter act; the numbers are differences of logprobs."""

    status: Literal["proven", "no_effect", "failed", "not_yet"]
    at: int | None = None
    probe: str | None = None
    engine: str | None = None
    effect: float | None = None
    error: float | None = None
    margin: float | None = None
    reason: str | None = None


class ModelCard(Answer):
    """`parent` of an adapter is its base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    proof: Proof | None = None  # of an adapter


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]
    has_more: bool


class ModelHealth(Answer):
    status: Literal["ok", "unavailable"]


class Health(Answer):
    status: Literal["ok", "degraded"]
    models: dict[str, ModelHealth]
