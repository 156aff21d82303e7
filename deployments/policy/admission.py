"""Decides whether a tenant's request may start now: a token bucket and a concurrency limit.

Pure functions of a TenantLoad, its Limits and the time; the caller keeps the TenantLoads. All
arithmetic is in integers, so that a refusal names exactly when a retry would succeed.
"""

from dataclasses import dataclass, replace

SECOND_NS = 10**9
MINUTE_NS = 60 * SECOND_NS
CONCURRENCY_RETRY_S = 1  # when a running request ends cannot be predicted


@dataclass(frozen=True, slots=True)
class Limits:
    """None is no limit. `max_concurrent_requests` counts each answer that a request asks for.

    The bucket holds one minute's requests, which may be used at once."""

    requests_per_minute: int | None = None
    max_concurrent_requests: int | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class TenantLoad:
    """State of one tenant.

    `debt` is the amount missing from a full bucket at `at_ns`: a request adds MINUTE_NS, and each
    nanosecond pays back `requests_per_minute`.
    """

    num_running: int = 0
    debt: int = 0
    at_ns: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """The limit that was reached, and after how many whole seconds to retry."""

    limit: str  # a field of Limits
    value: int
    retry_after_s: int


def admit(load: TenantLoad, limits: Limits, now_ns: int) -> TenantLoad | Refusal:
    """Return the load with one more running request, or a Refusal, which costs nothing."""
    debt = _debt(load, limits, now_ns)
    rate, most = limits.requests_per_minute, limits.max_concurrent_requests
    if rate is not None:
        excess = debt + MINUTE_NS - rate * MINUTE_NS
        if excess > 0:
            return Refusal("requests_per_minute", rate, _ceil(excess, rate * SECOND_NS))
        debt += MINUTE_NS
    if most is not None and load.num_running >= most:
        return Refusal("max_concurrent_requests", most, CONCURRENCY_RETRY_S)
    return TenantLoad(load.num_running + 1, debt, now_ns)


def grow(load: TenantLoad, limits: Limits, num_more: int) -> TenantLoad | Refusal:
    """Return the load with so many more answers of a request that was admitted, or a Refusal."""
    most = limits.max_concurrent_requests
    if most is not None and load.num_running + num_more > most:
        return Refusal("max_concurrent_requests", most, CONCURRENCY_RETRY_S)
    return replace(load, num_running=load.num_running + num_more)


def release(load: TenantLoad, num: int = 1) -> TenantLoad:
    """Return the load after a request of so many answers has ended, in whatever way."""
    assert load.num_running >= num, "more requests ended than began"
    return replace(load, num_running=load.num_running - num)


def is_idle(load: TenantLoad, limits: Limits, now_ns: int) -> bool:
    """Whether this load equals that of a tenant never seen, so that it can be dropped."""
    return load.num_running == 0 and _debt(load, limits, now_ns) == 0


def _debt(load: TenantLoad, limits: Limits, now_ns: int) -> int:
    rate = limits.requests_per_minute
    if rate is None:
        return 0
    return max(0, load.debt - rate * max(0, now_ns - load.at_ns))


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
