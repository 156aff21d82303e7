"""TenantLimiter: hold every tenant to its limits at one ingress replica.

`policy.admission` decides; here is the state, bounded in memory, and the answer to a refusal.
Knows no keys: the caller says which tenant it is.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from deployments.ingress.http_errors import rate_limited, too_many_answers
from deployments.ingress.metrics import Metrics
from deployments.ingress.urgency import NORMAL
from deployments.policy.admission import Limits, Refusal, TenantLoad, admit, grow, is_idle, release

SPARE_LOADS = 64  # idle tenants that may be remembered before the first sweep


class TenantLimiter:
    """Used in one event loop. A tenant's TenantLoad counts the answers of open `inside` blocks."""

    def __init__(self, metrics: Metrics, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._metrics = metrics
        self._clock_ns = clock_ns
        self._loads: dict[str, tuple[TenantLoad, Limits]] = {}
        self._sweep_at = SPARE_LOADS

    @property
    def num_known(self) -> int:
        return len(self._loads)

    def num_running(self, tenant: str) -> int:
        return self._loads[tenant][0].num_running if tenant in self._loads else 0

    @contextmanager
    def inside(self, tenant: str, limits: Limits) -> Generator["Place"]:
        """Count a request while it runs. Raises ApiError (429) if it may not begin."""
        now_ns = self._clock_ns()
        load = self._loads[tenant][0] if tenant in self._loads else TenantLoad(at_ns=now_ns)
        answer = admit(load, limits, now_ns)
        self._loads[tenant] = (self._granted(tenant, answer), limits)
        self._sweep(now_ns)
        place = Place(self, tenant)
        try:
            yield place
        finally:
            load, limits = self._loads[tenant]
            self._loads[tenant] = (release(load, place.num_answers), limits)

    def grow(self, tenant: str, num_more: int) -> None:
        """Count more answers of a running request. Raises ApiError (429)."""
        load, limits = self._loads[tenant]
        most = limits.max_concurrent_requests
        if most is not None and num_more >= most:
            raise too_many_answers(num_more + 1, most)
        self._loads[tenant] = (self._granted(tenant, grow(load, limits, num_more)), limits)

    def _granted(self, tenant: str, answer: TenantLoad | Refusal) -> TenantLoad:
        if isinstance(answer, Refusal):
            self._metrics.count_refusal(tenant, answer.limit)
            raise rate_limited(answer)
        return answer

    def _sweep(self, now_ns: int) -> None:
        """Forget idle tenants, each time the number of tenants has doubled."""
        if len(self._loads) <= self._sweep_at:
            return
        for tenant, (load, limits) in list(self._loads.items()):
            if is_idle(load, limits, now_ns):
                del self._loads[tenant]
        self._sweep_at = 2 * len(self._loads) + SPARE_LOADS


class Place:
    """One running request, which counts as one answer until it is known how many it asks for."""

    def __init__(self, limiter: TenantLimiter, tenant: str) -> None:
        self.num_answers = 1
        self.session = ""  # what the client calls the requests that belong together
        self.request_id = ""
        self.urgency = NORMAL
        self._limiter = limiter
        self._tenant = tenant

    def hold(self, num_answers: int) -> None:
        """Count all answers of the request. Raises ApiError if they are too many."""
        self._limiter.grow(self._tenant, num_answers - self.num_answers)
        self.num_answers = num_answers
