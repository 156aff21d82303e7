"""What one replica gave to tenants comes to the others, by the ingress that sends to both."""

import asyncio

from engine.scheduler.classes import PriorityClass
from tests.deployments.fleet.test_failover import Fleet, in_fleet, submit
from tests.deployments.support.fakes import until

STANDARD, BATCH = PriorityClass.STANDARD, PriorityClass.BATCH


def test_others_are_told_once_and_nobody_of_itself() -> None:
    async def test(running: Fleet) -> None:
        connection, engines = running.connection, running.engines
        names = iter(("one", "two"))
        connection._choose = lambda hints: hints.target or next(names, "one")  # type: ignore[method-assign]
        queues = [running.link.open([submit(name)]) for name in "ab"]
        await running.until_running(2)
        await until(lambda: len(running.link._streams.greeted()) == 2)
        connection.replicas["one"].note_served([("t", STANDARD, 5.0), ("t", BATCH, 2.0)])
        connection.replicas["two"].note_served([("u", STANDARD, 3.0)])
        await until(lambda: bool(engines["one"].elsewhere and engines["two"].elsewhere))
        connection.replicas["one"].note_served([("t", STANDARD, 4.0)])
        await until(lambda: len(engines["two"].elsewhere) == 3)
        await asyncio.sleep(0.1)  # some renewals more
        assert sorted(engines["two"].elsewhere[:2]) == [("t", STANDARD, 5.0), ("t", BATCH, 2.0)]
        assert engines["two"].elsewhere[2:] == [("t", STANDARD, 4.0)]
        assert engines["one"].elsewhere == [("u", STANDARD, 3.0)]
        for queue in queues:
            running.link.release(queue)

    in_fleet(test, renew_s=0.02)
