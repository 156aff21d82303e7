"""What an ingress replica and an engine replica say to each other. Plain data.

One long-lived stream per pair carries a Hello, then one frame per engine step with the news of
all requests of that ingress. Everything the other way goes through `control`: a few commands
at a time, answered by a Lease now and then, from which both sides notice what was lost.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from adapter_store.names import AdapterRef
from engine.messages import EngineInfo, EngineStats, GenerateRequest, Item

Frame = list[Item]


@dataclass(frozen=True, slots=True)
class Hello:
    """The first thing on a stream."""

    engine: EngineInfo
    base_fingerprint: str


@dataclass(frozen=True, slots=True)
class Submit:
    """`request.adapter` is left empty: where the files are is the replica's business."""

    request: GenerateRequest
    adapter: AdapterRef | None


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


Command = Submit | Abort


@dataclass(frozen=True, slots=True)
class Lease:
    """The replica's view of one ingress, at the time of the answer."""

    live_request_ids: frozenset[str]
    stats: EngineStats


class UnknownStream(Exception):
    """The replica has no such stream (any more): the ingress must attach again."""


class Connection(Protocol):
    """How an ingress reaches its engine replica: a Ray handle, or the replica itself in tests."""

    def attach(self, stream_id: str) -> AsyncIterator[Hello | Frame]: ...

    async def control(
        self, stream_id: str, commands: Sequence[Command], renew: bool
    ) -> Lease | None: ...
