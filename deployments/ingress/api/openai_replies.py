"""Write the bodies of OpenAI's answers: server-sent events and whole documents.

A plain text chunk is three byte strings joined: what is around the text is encoded once per
request, because chunks are written for every token of every stream.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any

from deployments.ingress.api.reply import Reply, Usage
from deployments.ingress.choice import Choice, TokenEntry
from deployments.text.vocabulary import Vocabulary
from engine.messages import TokenLogprobs

DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0  # JSON has no infinity

encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_encode_text = encode_basestring  # what encode_json comes to for a string, in C


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """The fields that every part of an answer repeats, and what the client wants in it."""

    reply_id: str
    created: int
    model: str
    has_logprobs: bool = False
    has_token_ids: bool = False
    num_prompt_logprobs: int | None = None  # vLLM's: None for none
    names_token_ids: bool = False  # tokens with logprobs are written as token_id:5
    has_usage_in_chunks: bool = False  # null until the last chunk
    has_usage_so_far: bool = False  # in every chunk, that of its choice

    def document(self, object_name: str) -> dict[str, Any]:
        fields = {"id": self.reply_id, "object": object_name, "created": self.created}
        return {**fields, "model": self.model}


def event(document: object) -> bytes:
    return f"data: {encode_json(document)}\n\n".encode()


class OpenAIReply(Reply):
    """Writes the parts that chats and completions share. A subclass writes the choices."""

    chunk_object: str
    whole_object: str

    def __init__(
        self, head: ReplyHead, vocabulary: Vocabulary, prompts: Sequence[Sequence[int]], n: int
    ) -> None:
        self._head = head
        self._vocabulary = vocabulary
        self._prompts = prompts
        self._n = n
        self._chunk_head = head.document(self.chunk_object)
        self._is_plain = not (head.has_logprobs or head.has_token_ids or head.has_usage_so_far)
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def text(self, choice: Choice, text: str) -> bytes:
        if self._is_plain:
            frame = self._frames.get(choice.index) or self._frame(choice.index)
            return b"".join((frame[0], _encode_text(text).encode(), frame[1]))
        return self._chunk(self._chunk_choice(choice, text), len(choice.token_ids))

    def closing(self, choice: Choice) -> bytes:
        document = self._chunk_choice(choice, None)
        document["finish_reason"] = self._reason(choice)
        document["stop_reason"] = choice.stop_reason
        return self._chunk(document, len(choice.token_ids))

    def ending(self, usage: Usage | None) -> bytes:
        if usage is None:
            return DONE
        return event({**self._chunk_head, "choices": [], "usage": usage.document()}) + DONE

    def whole(self, choices: Sequence[Choice], texts: Sequence[str], usage: Usage) -> bytes:
        documents = [self._whole_choice(c, t) for c, t in zip(choices, texts, strict=True)]
        head = self._head.document(self.whole_object)
        extra = self._whole_extra(choices)
        body = {**head, "choices": documents, "usage": usage.document(), **extra}
        return encode_json(body).encode()

    def _chunk(self, choice: dict[str, Any], num_tokens: int = 0, **more: Any) -> bytes:
        """Write a chunk of one choice, which has so many tokens by now."""
        usage: dict[str, Any] = {}
        if self._head.has_usage_so_far:
            index: int = choice["index"]
            num_prompt = len(self._prompts[index // self._n])
            usage = {"usage": Usage(num_prompt, 0, num_tokens).counts()}
        elif self._head.has_usage_in_chunks:
            usage = {"usage": None}
        return event({**self._chunk_head, "choices": [choice], **usage, **more})

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """Encode what comes before and after the text in a plain chunk of this choice."""
        mark = "\x00"
        chunk = self._chunk(self._bare_choice(index, mark)).decode()
        before, after = chunk.split(encode_json(mark))
        frame = self._frames[index] = (before.encode(), after.encode())
        return frame

    def _chunk_choice(self, choice: Choice, text: str | None) -> dict[str, Any]:
        document = self._bare_choice(choice.index, text)
        if self._head.has_logprobs:
            document["logprobs"] = self._logprobs(choice.unsent_entries)
        if self._head.has_token_ids:
            document["token_ids"] = choice.token_ids[choice.num_sent_tokens :]
        choice.unsent_entries.clear()
        choice.num_sent_tokens = len(choice.token_ids)
        return document

    def _end(self, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice.unsent_entries) if self._head.has_logprobs else None
        ids = {"token_ids": choice.token_ids} if self._head.has_token_ids else {}
        ends = {"finish_reason": self._reason(choice), "stop_reason": choice.stop_reason}
        return {"logprobs": logprobs, **ends, **ids}

    def _reason(self, choice: Choice) -> str | None:
        return choice.finish_reason

    def _prompt_of(self, index: int) -> list[int]:
        return list(self._prompts[index // self._n])

    def _bare_choice(self, index: int, text: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_extra(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {}

    def _prompt_logprobs(self, choice: Choice) -> dict[str, Any]:
        """Write the log-probabilities of the prompt, if they are wanted."""
        num_top = self._head.num_prompt_logprobs
        if num_top is None:
            return {}
        entries = choice.prompt_logprobs or [None]  # nothing precedes the only token of a prompt
        pairs = zip(self._prompts[choice.index // self._n], entries, strict=True)
        return {"prompt_logprobs": [self._prompt_entry(i, e, num_top) for i, e in pairs]}

    def _prompt_entry(
        self, token_id: int, entry: TokenLogprobs | None, num_top: int
    ) -> dict[str, Any] | None:
        """Name the token itself, then the likeliest ones."""
        if entry is None:
            return None
        named = {token_id: (entry.logprob, entry.rank)}
        for rank, (other, logprob) in enumerate(entry.top[:num_top], 1):
            named.setdefault(other, (logprob, rank))
        text_of = self._vocabulary.token_text
        return {
            str(i): {"logprob": finite(logprob), "rank": rank, "decoded_token": text_of(i)}
            for i, (logprob, rank) in named.items()
        }

    def _token_text(self, token_id: int) -> str:
        if self._head.names_token_ids:
            return f"token_id:{token_id}"
        return self._vocabulary.token_text(token_id)

    def _logprobs(self, entries: Sequence[TokenEntry]) -> dict[str, Any]:
        raise NotImplementedError


class ChatReply(OpenAIReply):
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def opening(self, index: int) -> bytes:
        choice = self._bare_choice(index, None)
        choice["delta"] = {"role": "assistant", "content": ""}
        if not self._head.has_token_ids or index:
            return self._chunk(choice)
        return self._chunk(choice, prompt_token_ids=self._prompt_of(index))

    def _bare_choice(self, index: int, text: str | None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": choice.index, "message": message, **self._end(choice)}

    def _whole_extra(self, choices: Sequence[Choice]) -> dict[str, Any]:
        ids = {"prompt_token_ids": self._prompt_of(0)} if self._head.has_token_ids else {}
        return {**ids, **self._prompt_logprobs(choices[0])}

    def _logprobs(self, entries: Sequence[TokenEntry]) -> dict[str, Any]:
        write = TokenWriter(self._token_text, self._vocabulary.token_bytes)
        return {"content": [write.entry(entry) for entry in entries], "refusal": None}


@dataclass(frozen=True, slots=True)
class TokenWriter:
    """Writes a token with its log probability, as chats and responses have it."""

    text_of: Callable[[int], str]
    bytes_of: Callable[[int], bytes]

    def entry(self, entry: TokenEntry) -> dict[str, Any]:
        assert entry.logprobs is not None, "chats have no prompt logprobs"
        top = [self.token(token_id, value) for token_id, value in entry.logprobs.top]
        return {**self.token(entry.token_id, entry.logprobs.logprob), "top_logprobs": top}

    def token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = list(self.bytes_of(token_id))
        return {"token": self.text_of(token_id), "logprob": finite(logprob), "bytes": raw}


class CompletionReply(OpenAIReply):
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def opening(self, index: int) -> bytes:
        if not self._head.has_token_ids:
            return b""
        choice = {**self._bare_choice(index, ""), "token_ids": list[int]()}
        return self._chunk({**choice, "prompt_token_ids": self._prompt_of(index)})

    def _bare_choice(self, index: int, text: str | None) -> dict[str, Any]:
        return {"index": index, "text": text or "", "logprobs": None, "finish_reason": None}

    def _whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        document = {"index": choice.index, "text": text, **self._end(choice)}
        if self._head.has_token_ids:
            document["prompt_token_ids"] = self._prompt_of(choice.index)
        return {**document, **self._prompt_logprobs(choice)}

    def _logprobs(self, entries: Sequence[TokenEntry]) -> dict[str, Any]:
        text_of = self._token_text
        return {
            "tokens": [text_of(entry.token_id) for entry in entries],
            "token_logprobs": [finite_logprob(entry.logprobs) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [entry.text_offset for entry in entries],
        }

    def _top(self, entry: TokenEntry) -> dict[str, float] | None:
        if entry.logprobs is None:
            return None
        text_of = self._token_text
        top: dict[str, float] = {}
        # Two tokens may have the same text: the likelier one is named. The chosen one always is.
        for token_id, value in entry.logprobs.top:
            top.setdefault(text_of(token_id), finite(value))
        top.setdefault(text_of(entry.token_id), finite(entry.logprobs.logprob))
        return top


def finite_logprob(logprobs: TokenLogprobs | None) -> float | None:
    return None if logprobs is None else finite(logprobs.logprob)


def finite(logprob: float) -> float:
    """Write a logprob that JSON can hold."""
    return max(logprob, LOWEST_LOGPROB)
