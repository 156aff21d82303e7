"""When a replica sends what it has for an ingress."""

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from deployments.replica.outbox import MAX_PACE_S, PACE_S, Outbox
from engine.messages import Item, RequestMetrics, RequestOutput
from tests.deployments.support.fakes import Clock


def run(test: Callable[[Outbox, Clock], Coroutine[None, None, None]]) -> None:
    async def outer() -> None:
        clock = Clock()
        await asyncio.wait_for(test(Outbox(clock), clock), 10)

    asyncio.run(outer())


def step(outbox: Outbox, *items: Item) -> None:
    for item in items:
        outbox.put(item[0] if isinstance(item, tuple) else item.request_id, item)
    outbox.end_step()


def is_ready(outbox: Outbox) -> bool:
    return outbox._wake.is_set()


def test_the_tokens_of_a_single_stream_never_wait() -> None:
    async def test(outbox: Outbox, clock: Clock) -> None:
        for token in range(3):
            step(outbox, ("a", 0, [token]))
            await outbox.wait()
            assert outbox.take(num_streams=1) == [("a", 0, [token])]

    run(test)


def test_tokens_of_steps_that_follow_fast_come_together() -> None:
    async def test(outbox: Outbox, clock: Clock) -> None:
        step(outbox, ("a", 0, [1]), ("b", 0, [2]))
        await outbox.wait()
        assert outbox.take(num_streams=5) == [("a", 0, [1]), ("b", 0, [2])]
        step(outbox, ("a", 0, [3]), ("b", 1, [4]))
        step(outbox, ("a", 0, [5, 6]), ("b", 0, [7]), ("b", 1, [8]))
        assert not is_ready(outbox)
        clock.now_s += 4 * PACE_S
        step(outbox, ("b", 1, [9]))
        assert is_ready(outbox)
        joined = [("a", 0, [3, 5, 6]), ("b", 1, [4]), ("b", 0, [7]), ("b", 1, [8, 9])]
        assert outbox.take(num_streams=5) == joined
        assert not outbox

    run(test)


def test_tokens_that_nothing_follows_come_by_themselves() -> None:
    async def test(outbox: Outbox, clock: Clock) -> None:
        outbox.take(num_streams=10_000)
        step(outbox, ("a", 0, [1]))
        assert not is_ready(outbox)
        began_s = asyncio.get_running_loop().time()
        await outbox.wait()
        assert asyncio.get_running_loop().time() - began_s > MAX_PACE_S / 2
        assert outbox.take(num_streams=10_000) == [("a", 0, [1])]

    run(test)


@pytest.mark.parametrize("is_last", [False, True], ids=["first", "last"])
def test_the_first_and_the_last_output_of_a_request_do_not_wait_and_others_do(
    is_last: bool,
) -> None:
    urgent = RequestOutput("a", 0, [3], metrics=RequestMetrics(0.0, 1, 0, 1))
    if is_last:
        urgent = RequestOutput("a", 0, [3], finish_reason="stop")

    async def test(outbox: Outbox, clock: Clock) -> None:
        outbox.take(num_streams=10_000)
        step(outbox, ("b", 0, [1]), ("a", 0, [2]))
        step(outbox, ("b", 0, [4]), urgent)
        assert is_ready(outbox)
        await outbox.wait()
        assert outbox.take(num_streams=10_000) == [("a", 0, [2]), urgent]
        await outbox.wait()
        assert outbox.take(num_streams=10_000) == [("b", 0, [1, 4])]

    run(test)


def test_tokens_are_not_joined_across_an_output_that_carries_more() -> None:
    output = RequestOutput("a", 0, [2], logprobs=[])

    async def test(outbox: Outbox, clock: Clock) -> None:
        outbox.take(num_streams=10_000)
        step(outbox, ("a", 0, [1]))
        step(outbox, output)
        step(outbox, ("a", 0, [3]))
        await outbox.wait()
        assert outbox.take(num_streams=2) == [("a", 0, [1]), output, ("a", 0, [3])]

    run(test)
