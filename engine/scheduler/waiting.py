"""WaitingQueue: requests in the order in which they come, but for priorities within a tenant."""

from collections import Counter, OrderedDict
from collections.abc import Iterator

from engine.scheduler.request import Request


class WaitingQueue:
    """Every request has a place. All but `add` among different priorities takes constant time."""

    def __init__(self) -> None:
        self._requests: OrderedDict[int, Request] = OrderedDict()  # by place, which are ordered
        self._places: dict[tuple[str, int], int] = {}
        self._priorities: dict[str, Counter[int]] = {}  # by tenant
        self._next = 0  # place of the next one at the end, and with a minus sign at the front

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def __contains__(self, request: Request) -> bool:
        return request.key in self._places

    def add(self, request: Request) -> None:
        """Add a request. A lower priority goes first, in places that its tenant has in the queue.

        So nobody's priority delays another tenant's requests.
        """
        self.append(request)
        tenant = request.scope.tenant
        if len(self._priorities[tenant]) == 1:
            return
        places = [at for at, other in self._requests.items() if other.scope.tenant == tenant]
        ordered = sorted((self._requests[at] for at in places), key=lambda other: other.priority)
        for at, other in zip(places, ordered, strict=True):
            self._put(at, other)

    def append(self, request: Request) -> None:
        """Add a request at the end, whatever its priority."""
        self._next += 1
        self._put(self._next, request)
        self._count(request)

    def appendleft(self, request: Request) -> None:
        """Add a request at the front, whatever its priority."""
        self._next += 1
        self._put(-self._next, request)
        self._requests.move_to_end(-self._next, last=False)
        self._count(request)

    def remove(self, request: Request) -> None:
        """Remove a request, which must be there."""
        del self._requests[self._places.pop(request.key)]
        priorities = self._priorities[request.scope.tenant]
        priorities[request.priority] -= 1
        if not priorities[request.priority]:
            del priorities[request.priority]
        if not priorities:
            del self._priorities[request.scope.tenant]

    def replace(self, request: Request, other: Request) -> None:
        """Give a request's place to another one of the same tenant and priority."""
        self._put(self._places.pop(request.key), other)

    def _put(self, place: int, request: Request) -> None:
        self._requests[place] = request
        self._places[request.key] = place

    def _count(self, request: Request) -> None:
        self._priorities.setdefault(request.scope.tenant, Counter())[request.priority] += 1
