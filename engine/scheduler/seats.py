"""Seats: whose running requests go back to the queue when all seats are taken.

A tenant that waits takes a seat from the one that has most of them, by weight, as long as that one
then still has no fewer, and was given more service. So no seat goes back and forth. A request that
goes back is computed again, mostly from cached blocks; so the newest one goes.
"""

from collections.abc import Iterable, Sequence

from engine.scheduler.fairness import TenantService
from engine.scheduler.request import Request


def may_yield(running: Sequence[Request], waiting: Sequence[Request]) -> bool:
    """Whether a seat may change hands, whatever service was given; one of each tenant is `waiting`.

    It stays as it is while the same requests run and wait.
    """
    seats = seats_by_tenant(running)
    if len(seats) == len(waiting) == 1 and waiting[0].scope.tenant in seats:
        return False
    most = max(running, key=lambda r: seats[r.scope.tenant], default=None)
    return most is not None and any(_may_take(request, most, seats) for request in waiting)


def seats_to_yield(
    running: Sequence[Request], waiting: Iterable[Request], service: TenantService
) -> list[Request]:
    """Choose running requests whose seats those that wait, in this order, should have."""
    seats, chosen = seats_by_tenant(running), list[Request]()
    left = list(running)
    for request in waiting:
        most = max(seats, key=seats.__getitem__)
        last = next(r for r in reversed(left) if r.scope.tenant == most)
        tenant = request.scope.tenant
        if service[tenant] >= service[most] or not _may_take(request, last, seats):
            break
        seats[most] -= 1 / last.weight
        seats[tenant] = seats.get(tenant, 0.0) + 1 / request.weight
        left.remove(last)
        chosen.append(last)
    return chosen


def seats_by_tenant(running: Iterable[Request]) -> dict[str, float]:
    """Count running requests, each over its tenant's weight."""
    seats: dict[str, float] = {}
    for request in running:
        tenant = request.scope.tenant
        seats[tenant] = seats.get(tenant, 0.0) + 1 / request.weight
    return seats


def _may_take(request: Request, other: Request, seats: dict[str, float]) -> bool:
    """Whether the other one's tenant would have no fewer seats than this one's."""
    taker, giver = request.scope.tenant, other.scope.tenant
    after = seats.get(taker, 0.0) + 1 / request.weight
    return taker != giver and after <= seats[giver] - 1 / other.weight
