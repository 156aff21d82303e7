"""The protocol between an ingress replica and the engine replicas. Plain data.

A request is handed over by `submit`, which the router sends to the best replica; the replica's
Receipt says whether it was accepted. Outputs come back on the one long-lived stream between that
replica and that ingress: a Hello, then one frame per engine step with the outputs of all requests
of the ingress. Everything else goes through `control`, addressed to one replica, which answers with
a Lease now and then; from it both sides notice what was lost.

A stream has an epoch. An ingress that has given up a stream opens the next one under the next
number, so that what is still on its way through the old one is never taken for the new one's.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from adapter_store.names import AdapterRef
from deployments.policy.shared_service import ServiceReport
from engine.messages import EngineInfo, EngineStats, GenerateRequest, Item, RequestError

Frame = list[Item]
DIGEST_CHARS = 12  # of digests that routers know: all figures go to each one, twice a second


@dataclass(slots=True)
class Hints:
    """The first argument of every call: all that the router knows of it.

    `target` names the only replica that the call is for. `is_leaving` is set by the router to tell
    the target that it is being stopped.
    """

    target: str = ""
    request_id: str = ""
    num_prompt_tokens: int = 0
    adapter_digest: str = ""  # empty for the base model
    tenant: str = ""
    avoid: tuple[str, ...] = ()
    is_leaving: bool = False
    session: str = ""  # requests of one session go to one replica if the load allows it
    prefix_keys: tuple[int, ...] = ()  # of the prompt, as in `policy.prefix_memory`
    ended: tuple[tuple[str, int], ...] = ()  # replica and tokens of requests that ended since


class StreamId(NamedTuple):
    ingress_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Hello:
    """The first thing on a stream."""

    engine: EngineInfo
    base_fingerprint: str
    replica_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Submit:
    """`request.adapter_folder` is left empty: the replica fills it in.

    `session` is the client's name for requests that belong together, for the router alone.
    `timeout_s`: its first token is wanted within so many seconds, or not at all.
    """

    request: GenerateRequest
    adapter_ref: AdapterRef | None
    session: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer to a Submit. Without a refusal the replica has accepted the request."""

    replica_id: str
    epoch: int
    refusal: RequestError | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str
    index: int | None = None  # of the only choice that is meant


@dataclass(frozen=True, slots=True)
class Lease:
    """The replica's view of one ingress, at the time of the answer."""

    live_request_ids: frozenset[str]
    stats: EngineStats
    is_draining: bool = False
    trouble: str | None = None  # why its engine takes no requests
    served: ServiceReport | None = None  # what tenants were given there


class UnknownStream(Exception):
    """The replica has no such stream (any more), or is not the target of the call."""


class Connection(Protocol):
    """Reaches the replicas from an ingress: by a Ray handle or, in tests, directly.

    `epochs` holds the replicas whose stream was given up at least once; all others are at 0.
    """

    async def submit(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int], submit: Submit
    ) -> Receipt: ...

    def attach(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int]
    ) -> AsyncIterator[Hello | Frame]: ...

    async def control(
        self,
        hints: Hints,
        stream_id: StreamId,
        aborts: Sequence[Abort],
        renew: bool,
        elsewhere: Sequence[ServiceReport] = (),
    ) -> Lease | None:
        """`elsewhere`: what other replicas of the same model have reported."""
        ...

    async def choose(self, hints: Hints) -> str:
        """Name the replica that a submit would go to now. Raises what the router raises."""
        ...
