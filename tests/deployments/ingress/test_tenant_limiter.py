"""The limits' state of all tenants at one ingress replica."""

import pytest

from deployments.ingress.http_errors import ApiError
from deployments.ingress.metrics import Metrics
from deployments.ingress.tenant_limiter import SPARE_LOADS, TenantLimiter
from deployments.policy.admission import (
    MINUTE_NS,
    Limits,
)


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def test_tenants_that_went_away_are_forgotten_and_busy_ones_are_not() -> None:
    clock = Clock()
    limiter = TenantLimiter(Metrics(200), clock)
    limits = Limits(requests_per_minute=1)
    with limiter.inside("busy", Limits(max_concurrent_requests=1)):
        for number in range(50 * SPARE_LOADS):
            clock.now_ns += MINUTE_NS
            with limiter.inside(f"tenant-{number}", limits):
                pass
            assert limiter.num_known <= 4 * SPARE_LOADS
        with pytest.raises(ApiError), limiter.inside("busy", Limits(max_concurrent_requests=1)):
            raise AssertionError
    assert limiter.num_running("busy") == 0


def test_tenants_in_debt_are_kept() -> None:
    limiter = TenantLimiter(Metrics(200), Clock())
    limits = Limits(requests_per_minute=1)
    names = [f"tenant-{number}" for number in range(5 * SPARE_LOADS)]
    for name in names:
        with limiter.inside(name, limits):
            pass
    for name in names:
        with pytest.raises(ApiError) as caught, limiter.inside(name, limits):
            raise AssertionError
        assert caught.value.headers()["retry-after"] == "60"


def test_an_error_frees_the_concurrency_place() -> None:
    limiter = TenantLimiter(Metrics(200), Clock())
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), limiter.inside("a", Limits(None, 1)):
            assert limiter.num_running("a") == 1
            raise ZeroDivisionError
    assert limiter.num_running("a") == 0
