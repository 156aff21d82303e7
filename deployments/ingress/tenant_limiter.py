"""TenantLimiter: hold every tenant to its limits, which all ingress replicas share.

The ledger and this ingress' leases decide (`policy.ledger`, `policy.leases`); here is the place of
one request in them, and the answer to a refusal. Knows no keys: the caller says which tenant it is.
"""

import time
from collections.abc import Callable, Sequence

from deployments.fleet.ledger_link import LedgerLink, OwnLedger
from deployments.ingress.http_errors import rate_limited, too_many_answers, too_many_tokens
from deployments.ingress.metrics import Metrics
from deployments.ingress.rate_headers import rate_headers
from deployments.ingress.urgency import NORMAL
from deployments.policy.admission import NO_LIMITS, Limits
from deployments.policy.leases import Need, Reserved

FIRST_ESTIMATE = 256  # tokens of an answer, before a tenant has had one
LEAST_ESTIMATE = 16
ABOVE_MEAN = 1.5  # an answer is reserved so many times the mean of those before
MEAN_OVER = 16  # answers
MAX_MEANS = 10_000  # tenants


class TenantLimiter:
    """Used in one event loop. A tenant's answers are counted while their places are held."""

    def __init__(
        self,
        metrics: Metrics,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        link: LedgerLink | None = None,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._metrics = metrics
        self._clock_ns, self._wall_s = clock_ns, wall_s
        self._link = link or OwnLedger(clock_ns, wall_s)
        self._leases = self._link.leases
        self._means: dict[str, float] = {}  # tokens of an answer, by tenant

    @property
    def num_known(self) -> int:
        return self._leases.num_known

    def num_running(self, tenant: str) -> int:
        return self._leases.num_running(tenant)

    def place(self, tenant: str, limits: Limits) -> "Place":
        """Make the place of a request, which holds nothing yet."""
        return Place(self, tenant, limits)

    async def take(self, tenant: str, limits: Limits, need: Need) -> Reserved:
        """Count what a request needs. Raises ApiError (429) if that is not there."""
        leases, wall_s = self._leases, self._wall_s()
        found = leases.take(tenant, limits, need, self._clock_ns(), wall_s)
        if found is None and not leases.is_alone:
            leases.want(tenant, need)
            await self._link.ask()
            found = leases.take(tenant, limits, need, self._clock_ns(), wall_s)
        if found is None and leases.is_alone:
            found = leases.take_alone(tenant, limits, need, self._clock_ns(), wall_s)
        if found is None:
            refusal = leases.refusal(tenant, need, self._clock_ns(), wall_s)
            self._metrics.count_refusal(tenant, refusal.limit)
            raise rate_limited(refusal)
        return found

    def leave(self, tenant: str, num_answers: int) -> None:
        self._leases.leave(tenant, num_answers)
        if self._leases.is_scarce(tenant):
            self._link.hurry()

    def settle(self, tenant: str, reserved: Reserved, used: int) -> None:
        self._leases.settle(tenant, reserved, used, self._wall_s())

    def headers(self, tenant: str) -> dict[str, str]:
        """Write what is left of a tenant's limits."""
        now_ns = self._clock_ns()
        requests = self._leases.request_allowance(tenant, now_ns)
        tokens = self._leases.token_allowance(tenant, now_ns, self._wall_s())
        return rate_headers(requests, tokens)

    def estimate(self, tenant: str) -> int:
        """Guess how many tokens an answer will have whose length the client leaves open."""
        mean = self._means.get(tenant)
        return FIRST_ESTIMATE if mean is None else max(LEAST_ESTIMATE, int(ABOVE_MEAN * mean))

    def learn(self, tenant: str, num_tokens: float) -> None:
        """Take an answer's length into account."""
        mean = self._means.get(tenant, num_tokens)
        if len(self._means) >= MAX_MEANS and tenant not in self._means:
            self._means.pop(next(iter(self._means)))
        self._means[tenant] = mean + (num_tokens - mean) / MEAN_OVER


class Place:
    """One request, which counts as one answer until it is known how many it asks for."""

    def __init__(self, limiter: TenantLimiter, tenant: str, limits: Limits) -> None:
        self.num_answers = 0
        self.session = ""  # what the client calls the requests that belong together
        self.request_id = ""
        self.urgency = NORMAL
        self._limiter = limiter
        self._tenant = tenant
        self._limits = limits
        self.is_limited = limits != NO_LIMITS
        self._reserved: Reserved | None = None
        self._num_open = 0  # answers whose lengths are not known

    async def enter(self) -> None:
        """Count the request. Raises ApiError (429) if it may not begin."""
        if self.is_limited:
            await self._limiter.take(self._tenant, self._limits, Need(requests=1, places=1))
        self.num_answers = 1

    async def hold(self, num_answers: int) -> None:
        """Count all answers of the request. Raises ApiError if they are too many."""
        most, more = self._limits.max_concurrent_requests, num_answers - self.num_answers
        if most is not None and num_answers > most:
            raise too_many_answers(num_answers, most)
        if self.is_limited and more:
            await self._limiter.take(self._tenant, self._limits, Need(places=more))
        self.num_answers = num_answers

    async def reserve(self, num_prompt: int, max_tokens: Sequence[int], is_open: bool) -> None:
        """Take the tokens of the prompts, and of answers of these lengths at most.

        `is_open`: the client did not name the lengths, so they are guessed. Raises ApiError: 400 if
        the tokens are more than can ever be there, 429 if they are not there now.
        """
        if not self._limits.counts_tokens:
            return
        if is_open:
            guess = self._limiter.estimate(self._tenant)
            max_tokens, self._num_open = [min(guess, m) for m in max_tokens], len(max_tokens)
        need, largest = num_prompt + sum(max_tokens), self._limits.largest_request()
        if largest is not None and need > largest[1]:
            if not is_open or num_prompt >= largest[1]:
                raise too_many_tokens(need, *largest)
            need = largest[1]
        self._reserved = await self._limiter.take(self._tenant, self._limits, Need(tokens=need))

    def settle(self, num_prompt: int, num_output: int) -> None:
        """Say how many tokens it became; without that they are those that were reserved."""
        if self._num_open and num_output:
            self._limiter.learn(self._tenant, num_output / self._num_open)
        if self._reserved is not None:
            self._limiter.settle(self._tenant, self._reserved, num_prompt + num_output)
            self._reserved = None

    def leave(self) -> None:
        """Count the request as ended."""
        if self.is_limited and self.num_answers:
            self._limiter.leave(self._tenant, self.num_answers)

    def headers(self) -> dict[str, str]:
        """Write what is left of the tenant's limits; empty if it has none of requests or tokens."""
        return self._limiter.headers(self._tenant) if self.is_limited else {}
