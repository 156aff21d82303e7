"""Tests the queue against a plain list under random operations."""

import random

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


def test_the_queue_is_a_list_with_each_tenants_priorities_in_its_own_places() -> None:
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
        assert list(queue) == plain and len(queue) == len(plain)
