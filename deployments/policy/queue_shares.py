"""Queue shares: each tenant's part of what waits at a replica, and who gives way to whom.

The engine serves tenants by their shares, so one waits for its own requests, as long as its part of
the replica takes for them, and never longer than for all of them together. Where the queue is full,
a tenant takes a place from the one that has most, by weight, as long as that one then still has no
fewer; before that, from lower classes. So who floods the queue is refused, not who comes after.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from deployments.policy.backlog import Backlog, Overload, wait_s, whole_seconds
from deployments.policy.capacity import Capacity


@dataclass(slots=True)
class FlowLoad:
    """What a replica has of one tenant's requests of one class; the lower `rank`, the more urgent.

    `queued_tokens` are of prompts without a first token.
    """

    tenant: str
    rank: int
    weight: float = 1.0
    num_open: int = 0
    queued_tokens: int = 0


def flow_wait_s(
    capacity: Capacity, backlog: Backlog, asking: FlowLoad, loads: Iterable[FlowLoad]
) -> float:
    """Predict the seconds until one more answer of this flow begins; 0 if nothing was measured.

    It waits for no lower class; of its own class for its own requests, in its share of the seats.
    """
    urgent = [load for load in loads if load.rank <= asking.rank]
    before = replace(
        backlog,
        num_open=sum(load.num_open for load in urgent),
        queued_tokens=min(sum(load.queued_tokens for load in urgent), backlog.queued_tokens),
    )
    peers = [load for load in urgent if load.rank == asking.rank and load.num_open]
    others = sum(load.weight for load in peers if load is not asking)
    times = (others + asking.weight) / asking.weight  # as slow as if all were its own
    own = replace(before, num_open=int(asking.num_open * times))
    own = replace(own, queued_tokens=int(asking.queued_tokens * times))
    has_higher = any(load.rank < asking.rank and load.num_open for load in urgent)
    together_s = wait_s(capacity, before)
    return together_s if has_higher else min(together_s, wait_s(capacity, own))


def too_late(expected_s: float, timeout_s: float) -> Overload | None:
    """Say why a first token that is expected in so many seconds is not waited for, or None."""
    if expected_s <= timeout_s:
        return None
    message = (
        f"The first token would come in about {expected_s:.3g} s, and at most {timeout_s:g} s are "
        "allowed."
    )
    return Overload(message, whole_seconds(expected_s - timeout_s))


def who_gives_way(asking: FlowLoad, num_more: int, loads: Iterable[FlowLoad]) -> list[FlowLoad]:
    """List the flows whose waiting requests give so many places to this one, the first one first.

    `asking` may be none of them. A flow of the same class must have no fewer than it afterwards.
    """
    after = (asking.num_open + num_more) / asking.weight
    lower = [load for load in loads if load.rank > asking.rank and load.num_open]
    peers = [
        load
        for load in loads
        if load.rank == asking.rank
        and load.tenant != asking.tenant
        and (load.num_open - num_more) / load.weight >= after
    ]
    return sorted([*lower, *peers], key=by_excess)


def by_excess(load: FlowLoad) -> tuple[int, float]:
    """Order flows: the lowest class first, then who has most by weight."""
    return -load.rank, -load.num_open / load.weight
