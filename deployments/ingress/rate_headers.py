"""The headers that say what is left of a tenant's limits, with OpenAI's names."""

from collections.abc import Awaitable, Callable
from math import ceil
from typing import cast

from starlette.types import Message, Send

from deployments.policy.leases import Allowance


def rate_headers(requests: Allowance | None, tokens: Allowance | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, allowance in (("requests", requests), ("tokens", tokens)):
        if allowance is not None:
            found[f"x-ratelimit-limit-{name}"] = str(allowance.limit)
            found[f"x-ratelimit-remaining-{name}"] = str(allowance.remaining)
            found[f"x-ratelimit-reset-{name}"] = duration(allowance.reset_s)
    return found


def duration(seconds: float) -> str:
    """Write `120ms`, `7.5s`, `6m0s`, `3h20m0s`; rounded up."""
    millis = ceil(seconds * 1000)
    if millis < 1000:
        return f"{millis}ms"
    if millis < 60_000:
        return f"{millis / 1000:g}s"
    minutes, rest = divmod(ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"


def with_headers(send: Send, headers: Callable[[], dict[str, str]]) -> Send:
    """Wrap `send` such that an answer has the headers as they are when it begins."""

    def send_with_headers(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            more = [(name.encode(), value.encode()) for name, value in headers().items()]
            # A list of its own: others may share theirs.
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        return send(message)

    return cast(Send, send_with_headers)
