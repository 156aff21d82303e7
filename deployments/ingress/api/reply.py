"""Reply: what writes an answer, in the form of one API."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.ingress.choice import Choice
from deployments.ingress.error_form import ErrorForm
from deployments.ingress.http_errors import ApiError


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_drafted_tokens: int = 0  # by speculation, and verified
    num_accepted_tokens: int = 0  # of them

    def counts(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
        }

    def document(self) -> dict[str, Any]:
        cached = {"cached_tokens": self.num_cached_tokens}
        return {
            **self.counts(),
            "prompt_tokens_details": cached,
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.num_accepted_tokens,
                "rejected_prediction_tokens": self.num_drafted_tokens - self.num_accepted_tokens,
            },
        }


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a whole answer, as the ingress sees them; the first two from its arrival on."""

    ttft_s: float
    e2e_s: float
    queue_s: float  # in the engine


class Reply:
    """Called in this order: begin, opening of each choice, text and closing of each, ending.

    For an answer that is no stream `whole` alone is called.
    """

    def headers(self, base: str) -> Mapping[str, str]:
        """List headers of the answer that are known before it. `base`: the base model's id."""
        return {}

    def headers_of_whole(self, usage: Usage, times: Times) -> Mapping[str, str]:
        """List further headers of an answer that is no stream, after `whole`."""
        return {}

    def begin(self, usage: Usage) -> bytes:
        """Write what precedes all choices. The usage is that of the prompts and first tokens."""
        return b""

    def opening(self, index: int) -> bytes:
        """Write what is sent for a choice before its first text."""
        raise NotImplementedError

    def text(self, choice: Choice, text: str) -> bytes:
        """Write new text."""
        raise NotImplementedError

    def closing(self, choice: Choice) -> bytes:
        """Write the end of a choice: why it ended."""
        raise NotImplementedError

    def ending(self, usage: Usage | None) -> bytes:
        """Write what follows the last choice, with the usage if it was asked for."""
        raise NotImplementedError

    def failing(self, error: ApiError, form: ErrorForm) -> bytes:
        """Write the end of a stream that an error ends, wherever it stands."""
        return form.event(error)

    def whole(self, choices: Sequence[Choice], texts: Sequence[str], usage: Usage) -> bytes:
        raise NotImplementedError
