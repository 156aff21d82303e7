"""Limits: how much a tenant may ask for; Refusal: which limit it met, and when to come again."""

from dataclasses import dataclass

SECOND_NS = 10**9
MINUTE_NS = 60 * SECOND_NS
DAY_S = 86_400
CONCURRENCY_RETRY_S = 1  # when a running request ends cannot be predicted


@dataclass(frozen=True, slots=True)
class Limits:
    """None is no limit. `max_concurrent_requests` counts each answer that a request asks for.

    Tokens are those of prompts and answers together. A burst is what a quiet tenant may use at
    once, a whole minute's where it is not given; days and months are those of UTC.
    """

    requests_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    tokens_per_minute: int | None = None
    request_burst: int | None = None
    token_burst: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None

    @property
    def most_requests(self) -> int | None:
        """How many requests may come at once."""
        return (
            None
            if self.requests_per_minute is None
            else _burst_of(self.request_burst, self.requests_per_minute)
        )

    @property
    def most_tokens(self) -> int | None:
        """How many tokens may ever come at once, by the rate alone."""
        return (
            None
            if self.tokens_per_minute is None
            else _burst_of(self.token_burst, self.tokens_per_minute)
        )

    @property
    def counts_tokens(self) -> bool:
        return not (self.tokens_per_minute is self.tokens_per_day is self.tokens_per_month is None)

    def largest_request(self) -> tuple[str, int] | None:
        """Name the limit beyond which no request can be admitted, however long it waits."""
        found = {
            "token_burst" if self.token_burst else "tokens_per_minute": self.most_tokens,
            "tokens_per_day": self.tokens_per_day,
            "tokens_per_month": self.tokens_per_month,
        }
        known = [(most, name) for name, most in found.items() if most is not None]
        if not known:
            return None
        most, name = min(known)
        return name, most


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Refusal:
    """The limit that was reached, and after how many whole seconds to retry."""

    limit: str  # a field of Limits
    value: int
    retry_after_s: int


def _burst_of(burst: int | None, rate: int) -> int:
    return rate if burst is None else burst
