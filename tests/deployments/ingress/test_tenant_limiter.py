"""The limits of all tenants at one ingress replica, and through the ledger of several."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from deployments.fleet.ledger_link import SPARE_ACCOUNTS, SharedLedger
from deployments.ingress.http_errors import ApiError
from deployments.ingress.metrics import Metrics
from deployments.ingress.rate_headers import duration
from deployments.ingress.tenant_limiter import Place, TenantLimiter
from deployments.policy.admission import MINUTE_NS, SECOND_NS, Limits
from deployments.policy.ledger import Answer, Ledger, Message

DAY = 1_900_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


async def entered(limiter: TenantLimiter, tenant: str, limits: Limits) -> Place:
    place = limiter.place(tenant, limits)
    await place.enter()
    return place


async def is_refused(limiter: TenantLimiter, tenant: str, limits: Limits) -> ApiError | None:
    try:
        (await entered(limiter, tenant, limits)).leave()
    except ApiError as error:
        return error
    return None


def test_tenants_that_went_away_are_forgotten_and_busy_ones_are_not() -> None:
    clock = Clock()
    limiter = TenantLimiter(Metrics(200), clock)
    limits, one = Limits(requests_per_minute=1), Limits(max_concurrent_requests=1)

    async def run() -> None:
        busy = await entered(limiter, "busy", one)
        for number in range(20 * SPARE_ACCOUNTS):
            clock.now_ns += MINUTE_NS
            (await entered(limiter, f"tenant-{number}", limits)).leave()
            assert limiter.num_known <= 4 * SPARE_ACCOUNTS
        assert await is_refused(limiter, "busy", one)
        busy.leave()
        assert limiter.num_running("busy") == 0
        assert not await is_refused(limiter, "busy", one)

    asyncio.run(run())


def test_tenants_in_debt_are_kept() -> None:
    limiter = TenantLimiter(Metrics(200), Clock())
    limits = Limits(requests_per_minute=1)
    names = [f"tenant-{number}" for number in range(5 * SPARE_ACCOUNTS)]

    async def run() -> None:
        for name in names:
            (await entered(limiter, name, limits)).leave()
        for name in names:
            refused = await is_refused(limiter, name, limits)
            assert refused is not None and refused.headers()["retry-after"] == "60"

    asyncio.run(run())


def test_tokens_are_reserved_by_what_may_come_and_settled_by_what_came() -> None:
    limiter = TenantLimiter(Metrics(200), Clock(), wall_s=lambda: DAY)
    limits = Limits(tokens_per_minute=1000)

    def remaining(place: Place) -> int:
        return int(place.headers()["x-ratelimit-remaining-tokens"])

    async def run() -> None:
        place = await entered(limiter, "a", limits)
        await place.reserve(100, [400], is_open=False)
        assert remaining(place) == 500
        place.settle(100, 50)
        assert place.headers()["x-ratelimit-limit-tokens"] == "1000"
        second = await entered(limiter, "a", limits)
        await second.reserve(100, [4000], is_open=True)
        assert remaining(second) == 850 - 356, "an answer of open length is guessed"
        second.settle(100, 600)
        third = await entered(limiter, "a", limits)
        with pytest.raises(ApiError) as caught:
            await third.reserve(400, [1], is_open=False)
        assert caught.value.status == 429 and "tokens per minute" in caught.value.message
        with pytest.raises(ApiError) as caught:
            await third.reserve(400, [601], is_open=False)
        assert caught.value.status == 400 and "1001" in caught.value.message
        assert limiter.estimate("a") == 900

    asyncio.run(run())


class Fleet:
    """Limiters of several ingresses on one ledger that can be taken away."""

    def __init__(self, num: int) -> None:
        self.clock = Clock()
        self.ledger: Ledger | None = Ledger("first", 0, grace_ns=0)
        self.links = [
            SharedLedger(self.call, f"ingress-{n}", num, self.clock, lambda: DAY)
            for n in range(num)
        ]
        self.limiters = [
            TenantLimiter(Metrics(200), self.clock, link, lambda: DAY) for link in self.links
        ]

    async def call(self, message: Message) -> Answer:
        await asyncio.sleep(0)
        if self.ledger is None:
            raise ConnectionError("gone")
        return self.ledger.take(message, self.clock.now_ns, DAY)


def in_fleet(num: int, test: Callable[[Fleet], Awaitable[None]]) -> None:
    async def run() -> None:
        fleet = Fleet(num)
        for link in fleet.links:
            link.start()
        try:
            async with asyncio.timeout(20):
                await test(fleet)
        finally:
            for link in fleet.links:
                await link.close()

    asyncio.run(run())


def test_several_ingresses_admit_together_what_the_limit_says() -> None:
    limits = Limits(requests_per_minute=100)

    async def test(fleet: Fleet) -> None:
        async def storm(limiter: TenantLimiter) -> int:
            refused = [await is_refused(limiter, "a", limits) for _ in range(100)]
            return refused.count(None)

        admitted = sum(await asyncio.gather(*map(storm, fleet.limiters)))
        assert 90 <= admitted <= 100

    in_fleet(3, test)


def test_a_fault_of_ours_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deployments.fleet.ledger_link.RETRY_S", 0.001)
    limits = Limits(requests_per_minute=60)

    async def test(fleet: Fleet) -> None:
        leases = fleet.links[0].leases
        with monkeypatch.context() as patch:
            patch.setattr(leases, "accept", lambda *_: 1 / 0)
            assert await is_refused(fleet.limiters[0], "a", limits) is None
            assert leases.is_alone and "division by zero" in caplog.text
        fleet.clock.now_ns += SECOND_NS
        while leases.is_alone:
            await asyncio.sleep(0.001)

    in_fleet(2, test)


def test_without_a_ledger_each_ingress_goes_on_with_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.fleet.ledger_link.RETRY_S", 0.001)
    limits = Limits(requests_per_minute=60, max_concurrent_requests=4)

    async def test(fleet: Fleet) -> None:
        fleet.ledger = None
        for limiter in fleet.limiters:
            refused = [await is_refused(limiter, "a", limits) for _ in range(40)]
            assert refused.count(None) == 30, "half of a minute's for each of two"
            assert refused[-1] is not None and refused[-1].status == 429
            assert fleet.links[0].leases.is_alone
        fleet.ledger = Ledger("second", fleet.clock.now_ns)
        fleet.clock.now_ns += 10 * SECOND_NS
        while any(link.leases.is_alone for link in fleet.links):
            await asyncio.sleep(0.001)
        assert not await is_refused(fleet.limiters[0], "a", limits)

    in_fleet(2, test)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0201, "21ms"), (7.5, "7.5s"), (360, "6m0s"), (12_000.2, "3h20m1s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
