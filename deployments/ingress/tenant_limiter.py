"""TenantLimiter: hold every tenant to its limits at one ingress replica.

`policy.admission` decides; here is the state, bounded in memory, and the answer to a refusal.
Knows no keys: the caller says which tenant it is.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deployments.ingress.http_errors import rate_limited
from deployments.ingress.metrics import Metrics
from deployments.policy.admission import Limits, Load, Refusal, admit, is_idle, release

SPARE_LOADS = 64  # idle tenants that may be remembered before the first sweep


class TenantLimiter:
    """Used in one event loop. A tenant's Load counts the `inside` blocks that are open."""

    def __init__(self, metrics: Metrics, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._metrics = metrics
        self._clock_ns = clock_ns
        self._loads: dict[str, tuple[Load, Limits]] = {}
        self._sweep_at = SPARE_LOADS

    @property
    def num_known(self) -> int:
        return len(self._loads)

    def num_running(self, tenant: str) -> int:
        return self._loads[tenant][0].num_running if tenant in self._loads else 0

    @contextmanager
    def inside(self, tenant: str, limits: Limits) -> Iterator[None]:
        """Count a request while it runs. Raises ApiError (429) if it may not begin."""
        now_ns = self._clock_ns()
        load = self._loads[tenant][0] if tenant in self._loads else Load(at_ns=now_ns)
        answer = admit(load, limits, now_ns)
        if isinstance(answer, Refusal):
            self._metrics.count_refusal(tenant, answer.limit)
            raise rate_limited(answer)
        self._loads[tenant] = (answer, limits)
        self._sweep(now_ns)
        try:
            yield
        finally:
            load, limits = self._loads[tenant]
            self._loads[tenant] = (release(load), limits)

    def _sweep(self, now_ns: int) -> None:
        """Forget idle tenants, each time the number of tenants has doubled."""
        if len(self._loads) <= self._sweep_at:
            return
        for tenant, (load, limits) in list(self._loads.items()):
            if is_idle(load, limits, now_ns):
                del self._loads[tenant]
        self._sweep_at = 2 * len(self._loads) + SPARE_LOADS
