"""WaitingQueue: requests that wait, a queue for each tenant, and the order between the queues."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, KeysView
from heapq import heapify, heappop, heapreplace

from engine.scheduler.request import Request


class WaitingQueue:
    """A tenant's requests go in the order in which they come, but for their priorities.

    Every request has a place. All but `add` among different priorities takes constant time.
    """

    def __init__(self) -> None:
        self._urgent: OrderedDict[tuple[str, int], Request] = OrderedDict()  # by key
        self._tenants: dict[str, TenantQueue] = {}  # none is empty
        self._next = self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        yield from self._urgent.values()
        for queue in self._tenants.values():
            yield from queue.requests.values()

    def __contains__(self, request: Request) -> bool:
        queue = self._tenants.get(request.scope.tenant)
        return request.key in self._urgent or (queue is not None and request.key in queue.places)

    @property
    def tenants(self) -> KeysView[str]:
        """Those with a request that waits, but for urgent ones."""
        return self._tenants.keys()

    def heads(self) -> list[Request]:
        """The next request of each tenant, but for urgent ones."""
        return [next(iter(queue.requests.values())) for queue in self._tenants.values()]

    def in_order(self, service: Callable[[str], float]) -> Iterator[Request]:
        """Yield urgent requests, then each time the next one of the tenant with least `service`.

        Between two, requests may be removed, and a tenant's service may grow. Among equals goes
        what came first.
        """
        yield from list(self._urgent.values())
        if len(self._tenants) == 1:
            yield from list(next(iter(self._tenants.values())).requests.values())
            return
        queues = {t: iter(list(q.requests.items())) for t, q in self._tenants.items()}
        heap = [(service(t), *next(requests), t) for t, requests in queues.items()]
        heapify(heap)  # places differ, so requests are never compared
        while heap:
            counted, place, request, tenant = heap[0]
            current = service(tenant)
            if current > counted:
                heapreplace(heap, (current, place, request, tenant))
                continue
            yield request
            following = next(queues[tenant], None)
            if following is None:
                heappop(heap)
            else:
                heapreplace(heap, (service(tenant), *following, tenant))

    def add_urgent(self, request: Request) -> None:
        """Add a request that goes before all tenants' others."""
        self._urgent[request.key] = request
        self._count += 1

    def add(self, request: Request) -> None:
        """Add a request. A lower priority goes first among those of its tenant."""
        self.append(request)
        self._tenants[request.scope.tenant].sort()

    def append(self, request: Request) -> None:
        """Add a request at its tenant's end, whatever its priority."""
        self._next += 1
        self._queue(request).append(self._next, request)

    def appendleft(self, request: Request) -> None:
        """Add a request at its tenant's front, whatever its priority."""
        self._next += 1
        self._queue(request).appendleft(-self._next, request)

    def remove(self, request: Request) -> None:
        """Remove a request, which must be there."""
        self._count -= 1
        if self._urgent.pop(request.key, None) is not None:
            return
        queue = self._tenants[request.scope.tenant]
        queue.remove(request)
        if not queue.requests:
            del self._tenants[request.scope.tenant]

    def replace(self, request: Request, other: Request) -> None:
        """Give a request's place to another one of the same tenant and priority."""
        if request.key in self._urgent:
            entries = [other if r is request else r for r in self._urgent.values()]
            self._urgent = OrderedDict((r.key, r) for r in entries)
        else:
            self._tenants[request.scope.tenant].replace(request, other)

    def _queue(self, request: Request) -> "TenantQueue":
        """The queue that gets one more."""
        self._count += 1
        return self._tenants.setdefault(request.scope.tenant, TenantQueue())


class TenantQueue:
    """Requests of one tenant, by places, which are ordered."""

    def __init__(self) -> None:
        self.requests: OrderedDict[int, Request] = OrderedDict()
        self.places: dict[tuple[str, int], int] = {}
        self._priorities: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.requests)

    def append(self, place: int, request: Request) -> None:
        self._put(place, request)
        self._priorities[request.priority] += 1

    def appendleft(self, place: int, request: Request) -> None:
        self.append(place, request)
        self.requests.move_to_end(place, last=False)

    def sort(self) -> None:
        """Order the requests by priority, where they differ, in the places that they have."""
        if len(self._priorities) == 1:
            return
        ordered = sorted(self.requests.values(), key=lambda request: request.priority)
        for place, request in zip(list(self.requests), ordered, strict=True):
            self._put(place, request)

    def remove(self, request: Request) -> None:
        del self.requests[self.places.pop(request.key)]
        self._priorities[request.priority] -= 1
        if not self._priorities[request.priority]:
            del self._priorities[request.priority]

    def replace(self, request: Request, other: Request) -> None:
        self._put(self.places.pop(request.key), other)

    def _put(self, place: int, request: Request) -> None:
        self.requests[place] = request
        self.places[request.key] = place
