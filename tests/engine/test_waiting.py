"""Tests the queues against plain lists under random operations."""

import random
from collections.abc import Callable, Iterable

from engine.scheduler.classes import Flow
from engine.scheduler.request import CacheScope, Request, SamplingParams
from engine.scheduler.waiting import WaitingQueue


def make_request(number: int, tenant: str, priority: int) -> Request:
    scope = CacheScope(tenant=tenant)
    return Request(f"r{number}", [1], SamplingParams(), 0.0, scope=scope, priority=priority)


def add(plain: list[Request], request: Request) -> None:
    """What a queue means: the tenant's requests, by priority, in the tenant's places."""
    plain.append(request)
    places = [i for i, r in enumerate(plain) if r.scope.tenant == request.scope.tenant]
    if len({plain[i].priority for i in places}) > 1:
        ordered = sorted((plain[i] for i in places), key=lambda r: r.priority)
        for place, each in zip(places, ordered, strict=True):
            plain[place] = each


def test_each_tenants_queue_is_a_list_with_priorities() -> None:
    rng = random.Random(0)
    queue, plain = WaitingQueue(), list[Request]()
    for number in range(3000):
        request = make_request(number, rng.choice("abc"), rng.choice([0, 0, 0, 1, -2]))
        match rng.choice(["add", "add", "append", "appendleft", "remove", "remove", "replace"]):
            case "add":
                queue.add(request)
                add(plain, request)
            case "append":
                queue.append(request)
                plain.append(request)
            case "appendleft":
                queue.appendleft(request)
                plain.insert(0, request)
            case "remove" if plain:
                leaving = rng.choice(plain)
                assert leaving in queue
                queue.remove(leaving)
                plain.remove(leaving)
                assert leaving not in queue
            case _ if plain:
                at = rng.randrange(len(plain))
                old = plain[at]
                plain[at] = make_request(number, old.scope.tenant, old.priority)
                queue.replace(old, plain[at])
            case _:
                pass
        for order in (queue, queue.in_order(lambda _: (0, 0.0))):
            assert by_tenant(order) == by_tenant(plain)
        assert len(queue) == len(plain) and queue.flows == {r.flow for r in plain}


def by_service(service: dict[str, float]) -> Callable[[Flow], tuple[int, float]]:
    return lambda flow: (0, service[flow.tenant])


def by_tenant(requests: Iterable[Request]) -> dict[str, list[Request]]:
    found: dict[str, list[Request]] = {}
    for request in requests:
        found.setdefault(request.scope.tenant, []).append(request)
    return found


def test_the_tenant_with_the_least_service_goes_next() -> None:
    rng = random.Random(1)
    for _ in range(200):
        queue, service = WaitingQueue(), {tenant: float(rng.randrange(5)) for tenant in "abcd"}
        left: dict[str, list[Request]] = {}
        for number in range(rng.randrange(1, 12)):
            request = make_request(number, rng.choice("abcd"), 0)
            queue.append(request)
            left.setdefault(request.scope.tenant, []).append(request)
        for request in queue.in_order(by_service(service)):
            tenant = request.scope.tenant
            assert service[tenant] == min(service[other] for other in left)
            assert left[tenant].pop(0) is request
            if not left[tenant]:
                del left[tenant]
            if rng.random() < 0.7:  # it is served, and goes
                queue.remove(request)
                service[tenant] += rng.randrange(4)
        assert not left


def test_urgent_requests_go_first_and_equals_as_they_came() -> None:
    queue = WaitingQueue()
    first, second, urgent = (make_request(n, t, 0) for n, t in enumerate("bab"))
    queue.append(first)
    queue.append(second)
    queue.add_urgent(urgent)
    assert list(queue.in_order(lambda _: (0, 0.0))) == [urgent, first, second]
    assert urgent in queue and len(queue) == 3
    queue.remove(urgent)
    assert list(queue.in_order(lambda _: (0, 0.0))) == [first, second]
