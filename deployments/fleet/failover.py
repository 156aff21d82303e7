"""Journey: one planned request on its way to its last token, over as many replicas as it takes.

Each stay at a replica is a Leg, an engine's request of its own. When a leg is lost, the next ones
carry the tokens so far as if they had been part of the question; the sampler's noise depends on
(seed + choice index, position) alone, so the answer goes on as if nothing had happened. The
reader sees one request: the planned ids and indexes, every token once.

Pure bookkeeping: no clock, no transport, no decision about where to go.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from adapter_store.names import AdapterRef
from deployments.fleet.protocol import Submit
from engine.messages import GenerateRequest, Item, RequestError, RequestOutput


@dataclass(eq=False, slots=True)
class Leg:
    """What one engine is asked. Its choice 0 is the journey's choice `first_index`.

    `stay` is the link to the replica that has accepted it; until then what comes early is kept,
    with the link that it came by.
    """

    journey: "Journey"
    request: GenerateRequest
    first_index: int
    num_open: int  # choices that have not finished
    num_losses: int = 0
    avoid: tuple[str, ...] = ()
    stay: Any = None
    early: list[tuple[Any, Item]] = field(default_factory=list[tuple[Any, Item]])
    missing_since_s: float | None = None

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def submit(self) -> Submit:
        return Submit(self.request, self.journey.adapter_ref)


class Journey:
    """Owns what has been delivered. A choice that has ended gets nothing more."""

    __slots__ = (
        "_deliver",
        "_is_open",
        "_num_legs",
        "_token_ids",
        "adapter_ref",
        "legs",
        "planned",
    )

    def __init__(self, submit: Submit, deliver: Callable[[Item], None]) -> None:
        self.planned = submit.request
        self.adapter_ref: AdapterRef | None = submit.adapter_ref
        self.legs: dict[str, Leg] = {}
        self._deliver = deliver
        self._token_ids: list[list[int]] = [[] for _ in range(submit.request.n)]
        self._is_open = [True] * submit.request.n
        self._num_legs = 0

    def first_leg(self) -> Leg:
        return self._add(self.planned, 0, num_losses=0, avoid=())

    def take(self, leg: Leg, item: Item) -> None:
        """Pass on what a leg brings."""
        if type(item) is tuple:
            index = leg.first_index + item[1]
            if self._is_open[index]:
                self._token_ids[index].extend(item[2])
                is_planned = leg.request is self.planned
                self._deliver(item if is_planned else (self.planned.request_id, index, item[2]))
        else:
            self._take_output(leg, item)  # type: ignore[arg-type]

    def _take_output(self, leg: Leg, output: RequestOutput) -> None:
        index = leg.first_index + output.index
        if not self._is_open[index]:
            return
        self._token_ids[index].extend(output.token_ids)
        if output.finish_reason is not None:
            self._is_open[index] = False
            leg.num_open -= 1
            if leg.num_open == 0:
                self.legs.pop(leg.id, None)
        self._deliver(replace(output, request_id=self.planned.request_id, index=index))

    def fail(self, leg: Leg, error: RequestError) -> None:
        """End every choice that the leg was to finish."""
        for index in range(leg.request.n):
            self._take_output(
                leg, RequestOutput(leg.id, index, [], finish_reason="error", error=error)
            )

    def next_legs(self, leg: Leg, num_losses: int, avoid: tuple[str, ...]) -> list[Leg]:
        """What is left of a leg that is lost: as it was if nothing has been delivered, else each
        unfinished choice by itself."""
        self.legs.pop(leg.id, None)
        if leg.request.n > 1 and not any(self._token_ids):
            return [self._add(self._renamed(leg.request), leg.first_index, num_losses, avoid)]
        indexes = range(leg.first_index, leg.first_index + leg.request.n)
        return [
            self._add(self._renamed(self._rest(index)), index, num_losses, avoid)
            for index in indexes
            if self._is_open[index]
        ]

    def rename(self, leg: Leg) -> None:
        """Before it is submitted again, when nobody can know whether it was accepted before."""
        self.legs.pop(leg.id, None)
        leg.request = self._renamed(leg.request)
        leg.early.clear()
        self.legs[leg.id] = leg

    def _rest(self, index: int) -> GenerateRequest:
        """One choice from its next token on. `max_tokens` stays the total."""
        planned, token_ids = self.planned, self._token_ids[index]
        sampling = replace(planned.sampling, seed=_as_seed(planned.sampling.seed + index))
        if any(self._token_ids):  # the prompt's logprobs came with the very first token
            sampling = replace(sampling, prompt_logprobs=None)
        return replace(planned, sampling=sampling, n=1, output_token_ids=list(token_ids))

    def _renamed(self, request: GenerateRequest) -> GenerateRequest:
        self._num_legs += 1
        return replace(request, request_id=f"{self.planned.request_id}~{self._num_legs}")

    def _add(
        self, request: GenerateRequest, first_index: int, num_losses: int, avoid: tuple[str, ...]
    ) -> Leg:
        leg = Leg(self, request, first_index, request.n, num_losses, avoid)
        self.legs[leg.id] = leg
        return leg


def _as_seed(number: int) -> int:
    """The sampler counts modulo 2**64; seeds are written as signed."""
    return (number + 2**63) % 2**64 - 2**63
