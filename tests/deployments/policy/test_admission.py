"""Limits against a bucket of fractions that is filled by hand."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.policy.admission import (
    MINUTE_NS,
    SECOND_NS,
    Limits,
    Refusal,
    TenantLoad,
    admit,
    is_idle,
    release,
)

LIMIT = st.none() | st.integers(1, 6)
LIMITS = st.builds(Limits, LIMIT, LIMIT)
# Times that often meet a bucket's own: whole seconds, thirds of a minute, and any.
PAUSE_NS = st.sampled_from([0, 1, SECOND_NS, 10 * SECOND_NS, 20 * SECOND_NS, MINUTE_NS])
STEPS = st.lists(st.tuples(PAUSE_NS | st.integers(0, 2 * MINUTE_NS), st.booleans()), max_size=60)


class Bucket:
    """The limits in other words: tokens that trickle in, and a list of who is inside."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.tokens = Fraction(limits.requests_per_minute or 0)
        self.num_running = 0

    def pass_time(self, pause_ns: int) -> None:
        rate = self.limits.requests_per_minute
        if rate is not None:
            self.tokens = min(Fraction(rate), self.tokens + Fraction(rate * pause_ns, MINUTE_NS))

    def begin(self) -> str | None:
        """Which limit refuses, if one does."""
        if self.limits.requests_per_minute is not None and self.tokens < 1:
            return "requests_per_minute"
        most = self.limits.max_concurrent_requests
        if most is not None and self.num_running == most:
            return "max_concurrent_requests"
        self.tokens -= 1
        self.num_running += 1
        return None


@given(LIMITS, STEPS)
def test_requests_are_admitted_exactly_when_a_bucket_has_a_token(
    limits: Limits, steps: list[tuple[int, bool]]
) -> None:
    now_ns, load, bucket = 5 * SECOND_NS, TenantLoad(at_ns=5 * SECOND_NS), Bucket(limits)
    for pause_ns, is_begin in steps:
        now_ns += pause_ns
        bucket.pass_time(pause_ns)
        if is_begin:
            answer = admit(load, limits, now_ns)
            refused = bucket.begin()
            assert (answer.limit if isinstance(answer, Refusal) else None) == refused
            load = load if isinstance(answer, Refusal) else answer
        elif bucket.num_running:
            load = release(load)
            bucket.num_running -= 1
        assert load.num_running == bucket.num_running
        is_full = bucket.tokens == (limits.requests_per_minute or bucket.tokens)
        assert is_idle(load, limits, now_ns) == (is_full and bucket.num_running == 0)


@given(st.integers(1, 1000), st.integers(0, MINUTE_NS))
def test_the_wait_of_a_refusal_is_long_enough_and_not_a_second_too_long(
    rate: int, pause_ns: int
) -> None:
    limits = Limits(requests_per_minute=rate)
    load = TenantLoad()
    for _ in range(rate):
        admitted = admit(load, limits, 0)
        assert isinstance(admitted, TenantLoad)
        load = admitted
    refusal = admit(load, limits, pause_ns)
    if not isinstance(refusal, Refusal):
        assert pause_ns * rate >= MINUTE_NS
        return
    assert refusal.retry_after_s >= 1
    again_ns = pause_ns + refusal.retry_after_s * SECOND_NS
    assert isinstance(admit(load, limits, again_ns), TenantLoad)
    assert isinstance(admit(load, limits, again_ns - SECOND_NS), Refusal)


@settings(max_examples=50)
@given(LIMITS, st.integers(0, 10), st.integers(0, 5 * MINUTE_NS))
def test_forgetting_an_idle_tenant_changes_nothing(
    limits: Limits, num_requests: int, pause_ns: int
) -> None:
    load = TenantLoad()
    for _ in range(num_requests):
        answer = admit(load, limits, 0)
        load = load if isinstance(answer, Refusal) else release(answer)
    if is_idle(load, limits, pause_ns):
        fresh = TenantLoad(at_ns=pause_ns)
        for _ in range(10):
            kept = admit(load, limits, pause_ns)
            assert kept == admit(fresh, limits, pause_ns)
            if isinstance(kept, Refusal):
                break
            load = fresh = kept


def test_a_new_limit_applies_to_what_was_used_before() -> None:
    load = TenantLoad()
    for _ in range(6):
        admitted = admit(load, Limits(requests_per_minute=60), 0)
        assert isinstance(admitted, TenantLoad)
        load = admitted
    assert isinstance(admit(load, Limits(requests_per_minute=6), 0), Refusal)
    assert isinstance(admit(load, Limits(), 0), TenantLoad)


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    limits = Limits(requests_per_minute=1)
    load = admit(TenantLoad(at_ns=MINUTE_NS), limits, MINUTE_NS)
    assert isinstance(load, TenantLoad)
    assert isinstance(admit(load, limits, 0), Refusal)
