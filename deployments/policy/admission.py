"""Whether a tenant's request may begin now: a token bucket and a count of what is running.

Pure functions of a Load, its Limits and the time; whoever calls them keeps the Loads. All
arithmetic is in whole numbers, so a refusal names the very moment at which it would have ended.
"""

from dataclasses import dataclass, replace

SECOND_NS = 10**9
MINUTE_NS = 60 * SECOND_NS
CONCURRENCY_RETRY_S = 1  # nobody knows when a running request ends


@dataclass(frozen=True, slots=True)
class Limits:
    """None is no limit. Whoever was quiet may use a whole minute's requests at once."""

    requests_per_minute: int | None = None
    max_concurrent_requests: int | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Load:
    """What one tenant has going on.

    `debt` is what is missing from a full bucket at `at_ns`: a request costs MINUTE_NS of it, and
    each nanosecond pays back `requests_per_minute`.
    """

    num_running: int = 0
    debt: int = 0
    at_ns: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which limit was reached, and after how many whole seconds to come back."""

    limit: str  # a field of Limits
    value: int
    retry_after_s: int


def admit(load: Load, limits: Limits, now_ns: int) -> Load | Refusal:
    """The load with one more request running, or why not. A refused request costs nothing."""
    debt = _debt(load, limits, now_ns)
    rate, most = limits.requests_per_minute, limits.max_concurrent_requests
    if rate is not None:
        excess = debt + MINUTE_NS - rate * MINUTE_NS
        if excess > 0:
            return Refusal("requests_per_minute", rate, _ceil(excess, rate * SECOND_NS))
        debt += MINUTE_NS
    if most is not None and load.num_running >= most:
        return Refusal("max_concurrent_requests", most, CONCURRENCY_RETRY_S)
    return Load(load.num_running + 1, debt, now_ns)


def release(load: Load) -> Load:
    """The load once one of its requests has ended, however it did."""
    assert load.num_running > 0, "more requests ended than began"
    return replace(load, num_running=load.num_running - 1)


def is_idle(load: Load, limits: Limits, now_ns: int) -> bool:
    """Whether forgetting this load would change nothing."""
    return load.num_running == 0 and _debt(load, limits, now_ns) == 0


def _debt(load: Load, limits: Limits, now_ns: int) -> int:
    rate = limits.requests_per_minute
    if rate is None:
        return 0
    return max(0, load.debt - rate * max(0, now_ns - load.at_ns))


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
