"""All that a client hears of one answer, on any route of OpenAI's: what must not change when its
engine dies."""

import asyncio
import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

from tests.chaos.stream import CUT, WHOLE, events

LOGPROB_TOLERANCE = 1e-4  # it may differ in its last bits: another engine, other batches


@dataclass
class Choice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    finish_reason: str = ""

    def is_same(self, other: "Choice") -> bool:
        words = (self.text, self.token_ids, self.finish_reason)
        return words == (other.text, other.token_ids, other.finish_reason) and (
            len(self.logprobs) == len(other.logprobs)
            and all(
                math.isclose(a, b, rel_tol=0, abs_tol=LOGPROB_TOLERANCE)
                for a, b in zip(self.logprobs, other.logprobs, strict=True)
            )
        )


@dataclass
class Transcript:
    """`end` is WHOLE, or what went wrong. `arrivals_s` has each event with new tokens."""

    sent_s: float = field(default_factory=time.monotonic)
    choices: dict[int, Choice] = field(default_factory=dict[int, Choice])
    num_tokens: int = 0
    arrivals_s: list[float] = field(default_factory=list[float])
    end: str = CUT
    ended_s: float = 0.0

    def take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.end = f"error event: {event['error']}"
        for choice in event.get("choices", ()):
            self._take_choice(choice)
        if event.get("usage"):
            self.num_tokens = event["usage"]["completion_tokens"]

    def _take_choice(self, choice: dict[str, Any]) -> None:
        mine = self.choices.setdefault(choice["index"], Choice())
        mine.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        mine.token_ids += choice.get("token_ids") or []
        mine.logprobs += _logprobs(choice.get("logprobs") or {})
        mine.finish_reason = choice.get("finish_reason") or mine.finish_reason
        if choice.get("token_ids"):
            self.arrivals_s.append(time.monotonic())

    def difference(self, expected: "Transcript") -> str | None:
        """What is not as it was when nothing died."""
        if self.end != WHOLE:
            return self.end
        if self.choices.keys() != expected.choices.keys():
            return f"choices {sorted(self.choices)} instead of {sorted(expected.choices)}"
        for index, choice in self.choices.items():
            other = expected.choices[index]
            if not choice.is_same(other):
                at = _first_difference(choice.token_ids, other.token_ids)
                return f"choice {index} differs from token {at} on: {choice} and not {other}"
        if self.num_tokens != expected.num_tokens:
            return f"{self.num_tokens} tokens in usage instead of {expected.num_tokens}"
        return None

    def gap_s(self, from_s: float, to_s: float) -> float:
        """The longest time without new tokens that began before `to_s` and ended after `from_s`."""
        times = [self.sent_s, *self.arrivals_s, self.ended_s]
        return max((b - a for a, b in pairwise(times) if b >= from_s and a <= to_s), default=0.0)


def _logprobs(found: dict[str, Any]) -> list[float]:
    if "content" in found:
        return [token["logprob"] for token in found["content"] or ()]
    return [value for value in found.get("token_logprobs", ()) if value is not None]


def _first_difference(a: list[int], b: list[int]) -> int:
    return next((at for at, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), -1)


async def transcribe(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> Transcript:
    heard = Transcript()
    try:
        async with session.post(path, json=body) as response:
            if response.status != 200:
                heard.end = f"{response.status}: {(await response.text())[:200]}"
            else:
                await _read(response, heard)
    except (aiohttp.ClientError, asyncio.IncompleteReadError, OSError) as error:
        heard.end = repr(error)
    heard.ended_s = time.monotonic()
    return heard


async def _read(response: aiohttp.ClientResponse, heard: Transcript) -> None:
    async for event in events(response):
        if event is not None:
            heard.take(event)
        elif heard.end == CUT:
            heard.end = WHOLE
