"""WaitingQueue: requests that wait, a queue for each tenant and class, and their order."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, KeysView
from heapq import heapify, heappop, heapreplace

from engine.scheduler.classes import Flow
from engine.scheduler.request import Request

Order = tuple[int, float]  # class and counter, as `TenantService.order` has them


class WaitingQueue:
    """A flow's requests go in the order in which they come, but for their priorities.

    Every request has a place. All but `add` among different priorities takes constant time.
    """

    def __init__(self) -> None:
        self._urgent: OrderedDict[tuple[str, int], Request] = OrderedDict()  # by key
        self._flows: dict[Flow, FlowQueue] = {}  # none is empty
        self._next = self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        yield from self._urgent.values()
        for queue in self._flows.values():
            yield from queue.requests.values()

    def __contains__(self, request: Request) -> bool:
        queue = self._flows.get(request.flow)
        return request.key in self._urgent or (queue is not None and request.key in queue.places)

    @property
    def flows(self) -> KeysView[Flow]:
        """Those with a request that waits, but for urgent ones."""
        return self._flows.keys()

    def heads(self) -> list[Request]:
        """The next request of each flow, but for urgent ones."""
        return [next(iter(queue.requests.values())) for queue in self._flows.values()]

    def in_order(self, order: Callable[[Flow], Order]) -> Iterator[Request]:
        """Yield urgent requests, then each time the next one of the flow that is first in `order`.

        Between two, requests may be removed, and a flow may go behind others. Among equals goes
        what came first.
        """
        yield from list(self._urgent.values())
        if len(self._flows) == 1:
            yield from list(next(iter(self._flows.values())).requests.values())
            return
        queues = {f: iter(list(q.requests.items())) for f, q in self._flows.items()}
        heap = [(order(f), *next(requests), f) for f, requests in queues.items()]
        heapify(heap)  # places differ, so requests are never compared
        while heap:
            known, place, request, flow = heap[0]
            current = order(flow)
            if current > known:
                heapreplace(heap, (current, place, request, flow))
                continue
            yield request
            following = next(queues[flow], None)
            if following is None:
                heappop(heap)
            else:
                heapreplace(heap, (order(flow), *following, flow))

    def add_urgent(self, request: Request) -> None:
        """Add a request that goes before all others."""
        self._urgent[request.key] = request
        self._count += 1

    def add(self, request: Request) -> None:
        """Add a request. A lower priority goes first among those of its flow."""
        self.append(request)
        self._flows[request.flow].sort()

    def append(self, request: Request) -> None:
        """Add a request at its flow's end, whatever its priority."""
        self._next += 1
        self._queue(request).append(self._next, request)

    def appendleft(self, request: Request) -> None:
        """Add a request at its flow's front, whatever its priority."""
        self._next += 1
        self._queue(request).appendleft(-self._next, request)

    def remove(self, request: Request) -> None:
        """Remove a request, which must be there."""
        self._count -= 1
        if self._urgent.pop(request.key, None) is not None:
            return
        queue = self._flows[request.flow]
        queue.remove(request)
        if not queue.requests:
            del self._flows[request.flow]

    def replace(self, request: Request, other: Request) -> None:
        """Give a request's place to another one of the same flow and priority."""
        if request.key in self._urgent:
            entries = [other if r is request else r for r in self._urgent.values()]
            self._urgent = OrderedDict((r.key, r) for r in entries)
        else:
            self._flows[request.flow].replace(request, other)

    def _queue(self, request: Request) -> "FlowQueue":
        """The queue that gets one more."""
        self._count += 1
        return self._flows.setdefault(request.flow, FlowQueue())


class FlowQueue:
    """Requests of one flow, by places, which are ordered."""

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
