"""Seats: whose running requests go back to the queue when all seats are taken.

A request of a higher class takes a seat from the lowest class that runs. Within a class, a tenant
that waits takes one from the tenant that has most of them, by weight, as long as that one then
still has no fewer, and was given more service. So no seat goes back and forth. A request that goes
back is computed again, mostly from cached blocks; so the newest one goes.
"""

from collections.abc import Collection, Iterable, Sequence

from engine.scheduler.classes import Flow, PriorityClass
from engine.scheduler.fairness import TenantService
from engine.scheduler.request import Request


def may_yield(running: Sequence[Request], waiting: Sequence[Request]) -> bool:
    """Whether a seat may change hands, whatever service was given; one of each flow is `waiting`.

    It stays as it is while the same requests run and wait.
    """
    seats = seats_by_flow(running)
    if not waiting or (len(seats) == len(waiting) == 1 and waiting[0].flow in seats):
        return False
    classes = {request.priority_class for request in waiting}
    if _has_lower(seats, min(classes)) and lowest(running, min(classes)) is not None:
        return True
    givers = {each: _newest_of_most(each, running, seats) for each in classes}
    return any(_may_take(request, givers[request.priority_class], seats) for request in waiting)


def seats_to_yield(
    running: Sequence[Request], waiting: Iterable[Request], service: TenantService
) -> list[Request]:
    """Choose running requests whose seats those that wait, in this order, should have."""
    seats, chosen = seats_by_flow(running), list[Request]()
    left = list(running)
    for request in waiting:
        last = _giver(request, left, seats)
        if last is None or not _is_owed(request, last, service):
            break
        seats[last.flow] -= 1 / last.weight
        seats[request.flow] = seats.get(request.flow, 0.0) + 1 / request.weight
        left.remove(last)
        chosen.append(last)
    return chosen


def seats_by_flow(running: Iterable[Request]) -> dict[Flow, float]:
    """Count running requests, each over its tenant's weight."""
    seats: dict[Flow, float] = {}
    for request in running:
        seats[request.flow] = seats.get(request.flow, 0.0) + 1 / request.weight
    return seats


def paused_flows(
    decodes: Sequence[tuple[Request, int]],
    prompts: Collection[Flow],
    running: Sequence[Request],
    service: TenantService,
) -> set[Flow]:
    """Choose the flows that do not decode in a step, so that others' prompts are computed sooner.

    Those of lower classes, and of the same class those who have more seats than who asks for a
    prompt, and were given more.
    """
    if not prompts:
        return set()
    decoding = {request.flow: request for request, _ in decodes}
    if len(decoding) <= 1 and all(flow in prompts for flow in decoding):
        return set()
    service.settle(running)
    seats = seats_by_flow(running)
    return {
        flow
        for flow, request in decoding.items()
        if any(_goes_before(prompt, flow, request, seats, service) for prompt in prompts)
    }


def _goes_before(
    prompt: Flow, flow: Flow, request: Request, seats: dict[Flow, float], service: TenantService
) -> bool:
    if prompt.priority_class != flow.priority_class:
        return prompt.priority_class < flow.priority_class and not request.keeps_seat
    is_behind = service[prompt] < service[flow]
    return is_behind and seats.get(prompt, 0.0) <= seats[flow] - 2 / request.weight


def lowest(running: Sequence[Request], above: PriorityClass) -> Request | None:
    """Return the newest request of the lowest class, if it may be made to wait for one `above`."""
    last: Request | None = None
    for request in running:
        known = above if last is None else last.priority_class
        is_lower = request.priority_class >= known and request.priority_class > above
        if is_lower and not request.keeps_seat:
            last = request
    return last


def _giver(
    request: Request, running: Sequence[Request], seats: dict[Flow, float]
) -> Request | None:
    """Return the running request whose seat this one may take; None if there is none."""
    if _has_lower(seats, request.priority_class):
        lower = lowest(running, request.priority_class)
        if lower is not None:
            return lower
    last = _newest_of_most(request.priority_class, running, seats)
    return last if _may_take(request, last, seats) else None


def _has_lower(flows: Iterable[Flow], priority_class: PriorityClass) -> bool:
    return any(flow.priority_class > priority_class for flow in flows)


def _newest_of_most(
    priority_class: PriorityClass, running: Sequence[Request], seats: dict[Flow, float]
) -> Request | None:
    """Return the newest request of the flow that has most seats of its class."""
    peers = [flow for flow in seats if flow.priority_class is priority_class]
    most = max(peers, key=seats.__getitem__, default=None)
    return next((r for r in reversed(running) if r.flow == most), None)


def _may_take(request: Request, other: Request | None, seats: dict[Flow, float]) -> bool:
    """Whether the other one's flow would have no fewer seats than this one's."""
    if other is None or other.flow == request.flow:
        return False
    after = seats.get(request.flow, 0.0) + 1 / request.weight
    return after <= seats[other.flow] - 1 / other.weight


def _is_owed(request: Request, last: Request, service: TenantService) -> bool:
    """Whether it is more urgent than the one that runs, or its tenant was given less."""
    is_urgent = request.priority_class < last.priority_class
    return is_urgent or service[request.flow] < service[last.flow]
