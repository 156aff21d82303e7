"""Write LoRAX's answers and errors.

In a stream each token is an event, and the last token's also holds the text and why it ended.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import msgspec

from deployments.ingress.api.embeddings import EmbeddingForm, Vector
from deployments.ingress.api.lorax import NUM_SEEDS, LoraxRequest
from deployments.ingress.api.openai_replies import (
    OpenAIReply,
    encode_json,
    event,
    finite,
    finite_logprob,
)
from deployments.ingress.api.reply import Times, Usage
from deployments.ingress.choice import Choice, TokenEntry
from deployments.ingress.error_form import ErrorForm
from deployments.ingress.http_errors import ApiError
from deployments.ingress.reply_form import ReplyForm, ReplyParts
from deployments.text.detokenizer import Detokenizer
from engine.messages import TokenLogprobs

_STATUS = {400: 422, 500: 424}
_TYPES = {
    401: "authentication",
    404: "not_found",
    424: "generation",
    429: "overloaded",
    503: "unavailable",
}
# What fields of completions are called here.
_RENAMED = {
    "max_tokens": "max_new_tokens",
    "ignore_eos": "ignore_eos_token",
    "truncate_prompt_tokens": "truncate",
}
_FIELD = re.compile(rf"\b({'|'.join(_RENAMED)})\b")


class LoraxErrors(ErrorForm):
    name = "LoraxError"

    def schema(self) -> dict[str, Any]:
        fields = {"error": {"type": "string"}, "error_type": {"type": "string"}}
        return {"type": "object", "properties": fields, "required": list(fields)}

    def status(self, error: ApiError) -> int:
        return _STATUS.get(error.status, error.status)

    def body(self, error: ApiError) -> bytes:
        message = _FIELD.sub(lambda found: _RENAMED[found[1]], error.message)
        kind = _TYPES.get(self.status(error), "validation")
        return json.dumps({"error": message, "error_type": kind}, ensure_ascii=False).encode()


LORAX_ERRORS = LoraxErrors()


@dataclass(frozen=True, slots=True)
class Asked:
    """What an answer needs to know of its request. `seed` is that of its first choice."""

    request: LoraxRequest
    seed: int
    is_listed: bool  # a list of one, as the route `/` gives it
    began_s: float
    clock: Callable[[], float]

    @property
    def prefix(self) -> str:
        """What stands before the generated text."""
        return self.request.inputs if self.request.asked.return_full_text else ""

    def form(self) -> ReplyForm:
        return ReplyForm("lorax-", lambda parts: LoraxReply(parts, self))


class LoraxReply(OpenAIReply):
    chunk_object = whole_object = "generation"

    def __init__(self, parts: ReplyParts, asked: Asked) -> None:
        super().__init__(parts.head, parts.vocabulary, parts.prompts, parts.n)
        self._request = asked
        self._asked = asked.request.asked
        self._arrival_s = asked.clock()
        self._detokenizers: dict[int, Detokenizer] = {}
        self._text = ""  # of the only choice of a stream
        self._best: Choice | None = None
        self._prefill_logprobs: Sequence[TokenLogprobs | None] | None = None

    # ---- headers -------------------------------------------------------------------------

    def headers(self, base: str) -> Mapping[str, str]:
        adapter = ",".join(self._asked.adapter_ids)
        headers = {
            "x-compute-characters": str(len(self._request.request.inputs)),
            "x-model-id": quote(base, safe="/:"),
        }
        if adapter in ("", base):
            return headers
        source = self._asked.adapter_source or "local"
        return {**headers, "x-adapter-id": quote(adapter, safe="/:@,+"), "x-adapter-source": source}

    def headers_of_whole(self, usage: Usage, times: Times) -> Mapping[str, str]:
        """List LoRAX's figures: counts of tokens, and times in milliseconds."""
        num_tokens = len(self._best.token_ids) if self._best is not None else 0
        total_s = self._request.clock() - self._request.began_s
        validation_s = self._arrival_s - self._request.began_s
        inference_s = max(0.0, times.e2e_s - times.queue_s)
        first_s = max(0.0, times.ttft_s - times.queue_s)
        seconds = {
            "x-compute-time": total_s,
            "x-total-time": total_s,
            "x-validation-time": validation_s,
            "x-queue-time": times.queue_s,
            "x-inference-time": inference_s,
            "x-time-per-token": inference_s / max(1, num_tokens),
            "x-time-to-first-token": first_s,
            "x-time-per-output-token": (inference_s - first_s) / max(1, num_tokens - 1),
        }
        counts = {
            "x-prompt-tokens": usage.num_prompt_tokens,
            "x-generated-tokens": num_tokens,
            "x-skipped-tokens": 0,
            "x-total-tokens": usage.num_prompt_tokens + num_tokens,
        }
        times_ms = {name: int(1000 * value) for name, value in seconds.items()}
        return {name: str(value) for name, value in {**counts, **times_ms}.items()}

    # ---- a stream ------------------------------------------------------------------------

    def opening(self, index: int) -> bytes:
        return b""

    def text(self, choice: Choice, text: str) -> bytes:
        """Write an event for each new token, but not for the last one of all."""
        self._text += text
        num_kept = 0 if choice.finish_reason is None else 1
        num = len(choice.unsent_entries) - num_kept
        entries, choice.unsent_entries[:] = choice.unsent_entries[:num], choice.unsent_entries[num:]
        tokens = self._tokens(choice, entries)
        return b"".join(map(_token_event, tokens))

    def closing(self, choice: Choice) -> bytes:
        """Write the events of the tokens that are left; with the last one, how it ended."""
        before = choice.unsent_entries[:-1]
        events = [_token_event(token) for token in self._tokens(choice, before)]
        [token] = self._tokens(choice, choice.unsent_entries[-1:], is_end=True)
        details = None
        if self._asked.details:
            prompt = self._prompt_of(choice.index)
            details = {
                "finish_reason": _finish_reason(choice),
                "prompt_tokens": len(prompt),
                "generated_tokens": len(choice.token_ids),
                "seed": self._seed_of(choice),
            }
        text = self._request.prefix + self._text
        events.append(event({"token": token, "generated_text": text, "details": details}))
        return b"".join(events)

    def ending(self, usage: Usage | None) -> bytes:
        return b""  # the last token's event is the end

    # ---- a document ----------------------------------------------------------------------

    def whole(self, choices: Sequence[Choice], texts: Sequence[str], usage: Usage) -> bytes:
        """Write the likeliest answer per token, with all others in its details."""
        self._prefill_logprobs = choices[0].prompt_logprobs
        pairs = list(zip(choices, texts, strict=True))
        best = max(pairs, key=lambda pair: pair[0].mean_logprob) if pairs[1:] else pairs[0]
        self._best = best[0]
        document: dict[str, Any] = {"generated_text": self._request.prefix + best[1]}
        if self._asked.wants_details:
            document["details"] = self._details(*best)
            if len(pairs) > 1:
                others = [pair for pair in pairs if pair is not best]
                sequences = [self._sequence(*pair) for pair in others]
                document["details"]["best_of_sequences"] = sequences
        return encode_json([document] if self._request.is_listed else document).encode()

    def _details(self, choice: Choice, text: str) -> dict[str, Any]:
        sequence = self._sequence(choice, text)
        del sequence["generated_text"]
        prompt = self._prompt_of(choice.index)
        return {**sequence, "prompt_tokens": len(prompt), "skipped_tokens": 0}

    def _sequence(self, choice: Choice, text: str) -> dict[str, Any]:
        return {
            "generated_text": self._request.prefix + text,
            "finish_reason": _finish_reason(choice),
            "generated_tokens": len(choice.token_ids),
            "seed": self._seed_of(choice),
            "prefill": self._prefill(self._prompt_of(choice.index)),
            "tokens": self._tokens(choice, choice.unsent_entries, is_end=True),
        }

    def _prefill(self, prompt: Sequence[int]) -> list[dict[str, Any]]:
        """Describe the prompt's tokens, if they were asked for."""
        if not self._asked.decoder_input_details:
            return []
        logprobs = self._prefill_logprobs or [None] * len(prompt)  # nothing precedes an only token
        text_of = self._vocabulary.token_text
        return [
            {"id": token_id, "text": text_of(token_id), "logprob": finite_logprob(entry)}
            for token_id, entry in zip(prompt, logprobs, strict=True)
        ]

    # ---- tokens --------------------------------------------------------------------------

    def _tokens(
        self, choice: Choice, entries: Sequence[TokenEntry], is_end: bool = False
    ) -> list[dict[str, Any]]:
        """Describe tokens, each with the text that it adds. `is_end`: no more follow."""
        detokenizer = self._detokenizers.get(choice.index)
        if detokenizer is None:
            prompt = self._prompt_of(choice.index)
            detokenizer = self._vocabulary.detokenizer(False, prompt)
            self._detokenizers[choice.index] = detokenizer
        texts = [detokenizer.push((entry.token_id,)) for entry in entries]
        if is_end and texts:
            texts[-1] += detokenizer.flush()
        return [self._token(e, text) for e, text in zip(entries, texts, strict=True)]

    def _token(self, entry: TokenEntry, text: str) -> dict[str, Any]:
        token: dict[str, Any] = {
            "id": entry.token_id,
            "text": text,
            "logprob": finite_logprob(entry.logprobs),
            "special": self._vocabulary.is_special(entry.token_id),
        }
        if self._asked.return_k_alternatives is not None and entry.logprobs is not None:
            text_of = self._vocabulary.token_text
            token["alternative_tokens"] = [
                {"id": token_id, "text": text_of(token_id), "logprob": finite(logprob)}
                for token_id, logprob in entry.logprobs.top
            ]
        return {**token, "skipped": False}

    def _seed_of(self, choice: Choice) -> int | None:
        return (self._request.seed + choice.index) % NUM_SEEDS if self._asked.is_sampled else None


class LoraxEmbeddingForm(EmbeddingForm):
    """Writes the vector of the only text."""

    def whole(self, reply_id: str, created: int, parts: Sequence[bytes], num_tokens: int) -> bytes:
        return b'{"embeddings":%b}' % parts[0]

    def part(self, index: int, vector: Vector) -> bytes:
        return msgspec.json.encode(vector.tolist())


def _finish_reason(choice: Choice) -> str:
    if choice.finish_reason != "stop":
        return "length"
    return "stop_sequence" if isinstance(choice.stop_reason, str) else "eos_token"


def _token_event(token: dict[str, Any]) -> bytes:
    """Write an event that is not the last."""
    return event({"token": token, "generated_text": None, "details": None})
