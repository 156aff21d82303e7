"""ReplyForm: which writer a surface's answers have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deployments.ingress.api.openai_replies import ChatReply, CompletionReply, ReplyHead
from deployments.ingress.api.parsed_chat_reply import ParsedChatReply
from deployments.ingress.api.reply import Reply
from deployments.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class ReplyParts:
    """What a writer of answers is made of. `is_parsed`: the choices are ParsedChoices."""

    head: ReplyHead
    vocabulary: Vocabulary
    prompts: Sequence[Sequence[int]]
    n: int
    new_call_id: Callable[[], str]
    is_parsed: bool = False
    shows_reasoning: bool = True
    names_call: bool = False  # the request names the tool that is called


@dataclass(frozen=True, slots=True)
class ReplyForm:
    id_prefix: str  # of an answer's id
    make: Callable[[ReplyParts], Reply]


def _chat_reply(parts: ReplyParts) -> Reply:
    if not parts.is_parsed:
        return ChatReply(parts.head, parts.vocabulary, parts.prompts, parts.n)
    return ParsedChatReply(
        parts.head,
        parts.vocabulary,
        parts.prompts,
        parts.n,
        parts.new_call_id,
        parts.shows_reasoning,
        parts.names_call,
    )


def _completion_reply(parts: ReplyParts) -> Reply:
    return CompletionReply(parts.head, parts.vocabulary, parts.prompts, parts.n)


OPENAI_CHAT = ReplyForm("chatcmpl-", _chat_reply)
OPENAI_COMPLETION = ReplyForm("cmpl-", _completion_reply)
