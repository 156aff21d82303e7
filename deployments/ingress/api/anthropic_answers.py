"""The shapes of Anthropic's answers, for the API's document. The writers are `MessagesReply` and
the cards of models.
"""

from typing import Any, Literal

from deployments.ingress.api.answers import Answer


class MessagesUsage(Answer):
    """`input_tokens` are those of the prompt that were not in the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(Answer):
    input_tokens: int


class AnthropicModel(Answer):
    id: str
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int | None
    max_tokens: int | None


class AnthropicModels(Answer):
    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None
