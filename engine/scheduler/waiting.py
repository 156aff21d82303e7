"""Queue requests: in the order in which they come, but for priorities within a tenant."""

from collections import deque

from engine.scheduler.request import Request


def enqueue(waiting: deque[Request], request: Request) -> None:
    """Add a request. A lower priority goes first, in places that its tenant has in the queue.

    So nobody's priority delays another tenant's requests.
    """
    waiting.append(request)
    if not any(other.priority != request.priority for other in waiting):
        return
    tenant = request.scope.tenant
    places = [at for at, other in enumerate(waiting) if other.scope.tenant == tenant]
    ordered = sorted((waiting[at] for at in places), key=lambda other: other.priority)
    for at, other in zip(places, ordered, strict=True):
        waiting[at] = other
