"""Sends one streamed completion and notes all that comes back, and when."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

COMPLETIONS = "/v1/completions"
PATIENCE_S = 120.0  # without a byte, a stream counts as one that hangs

# How a stream ended
WHOLE = "whole"
CUT = "cut"  # the connection ended without [DONE]
HANGS = "hangs"
REFUSED = "refused"  # no connection


@dataclass(slots=True)
class Heard:
    """What a client heard of one stream. `end` is one of the words above, or a status or error
    event: `503 unavailable`, `event internal_error`."""

    sent_s: float
    token_ids: list[int] = field(default_factory=list[int])
    arrivals_s: list[float] = field(default_factory=list[float])
    end: str = ""
    ended_s: float = 0.0
    message: str = ""

    @property
    def longest_gap_s(self) -> float:
        """Of the time from sending to the end, the longest without new tokens."""
        times = [self.sent_s, *self.arrivals_s, self.ended_s]
        return max(b - a for a, b in pairwise(times))

    @property
    def longest_gap_after_first_s(self) -> float:
        times = [*self.arrivals_s, self.ended_s] if self.arrivals_s else []
        return max((b - a for a, b in pairwise(times)), default=0.0)


def new_session(url: str) -> aiohttp.ClientSession:
    """A connection of its own for each request: none is sent over one that the server closes."""
    return aiohttp.ClientSession(
        url,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=PATIENCE_S),
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
    )


def streamed(model: str, prompt: list[int], num_tokens: int, seed: int) -> dict[str, Any]:
    """The body of a request whose tokens are decided by these alone. Even seeds are greedy."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": seed % 2,
        "seed": seed,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


async def listen(
    session: aiohttp.ClientSession, body: dict[str, Any], headers: dict[str, str] | None = None
) -> Heard:
    heard = Heard(time.monotonic())
    try:
        async with session.post(COMPLETIONS, json=body, headers=headers) as response:
            if response.status == 200:
                await _read(response, heard)
            else:
                _refuse(heard, response.status, await response.text())
    except aiohttp.ClientConnectorError as error:
        heard.end, heard.message = REFUSED, str(error)
    except (TimeoutError, aiohttp.ServerTimeoutError) as error:
        heard.end, heard.message = HANGS, str(error)
    except (aiohttp.ClientError, asyncio.IncompleteReadError, OSError) as error:
        heard.end, heard.message = CUT, repr(error)
    heard.ended_s = time.monotonic()
    return heard


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any] | None]:
    """Yield the events of a stream as they come; None for the mark of its end."""
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))
        elif line.startswith(b"data: [DONE]"):
            yield None


async def _read(response: aiohttp.ClientResponse, heard: Heard) -> None:
    heard.end = CUT
    async for event in events(response):
        if event is None:
            heard.end = WHOLE
        else:
            _take(heard, event)


def _take(heard: Heard, event: dict[str, Any]) -> None:
    if "error" in event:
        heard.end = f"event {event['error'].get('code')}"
        heard.message = str(event["error"].get("message"))
    for choice in event.get("choices", ()):
        if choice.get("token_ids"):
            heard.token_ids.extend(choice["token_ids"])
            heard.arrivals_s.append(time.monotonic())


def _refuse(heard: Heard, status: int, text: str) -> None:
    heard.message = text[:300]
    try:
        code = json.loads(text)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = "not JSON"
    heard.end = f"{status} {code}"
