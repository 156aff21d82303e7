"""TenantService: what each tenant has been given, so that the one with the least goes next.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). A
tenant is charged for the tokens that are computed for it: those of a prompt when a request begins,
but not what the prefix cache held, and each new one as it comes. Divided by the tenant's weight,
this is its counter. Of tenants that wait, the one with the lowest counter is served next; nobody
is made to wait for one that does not ask. A tenant that comes back after it had nothing waiting is
lifted to the lowest counter of those who wait, less a small credit: a burst of one that sends less
than its share is served at once, and more is not saved up.

So two tenants that both wait all of the time get, in terms of `charge`, equal service by weight.
What may lie between them is bounded by what runs at once, not by how long they have been waiting:
see `bound`.
"""

from collections.abc import Iterable, Set

from engine.scheduler.request import Request

INPUT_WEIGHT = 1.0  # of a prompt's token
OUTPUT_WEIGHT = 2.0  # of a generated one, which takes a step
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0  # of a tenant
CREDIT = 2000.0  # of service that a tenant may save up: a burst of some requests
FORGET_ABOVE = 1024  # idle tenants are forgotten when more than so many are known


class TenantService:
    """Counters of tenants. New tokens of running requests count when `settle` looks at them."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._last_left = ""  # tenant of the request that left the queue last
        self._forget_above = FORGET_ABOVE

    def __getitem__(self, tenant: str) -> float:
        """Weighted tokens over the tenant's weight; after `settle`, of all computed so far."""
        return self._counters.get(tenant, 0.0)

    def __len__(self) -> int:
        return len(self._counters)

    def enter(self, tenant: str, waiting: Set[str]) -> None:
        """Lift a tenant that begins to wait beside these others. Settle running requests before."""
        least = min((self[other] for other in waiting), default=self[self._last_left])
        self._counters[tenant] = max(self[tenant], least - CREDIT)

    def begin(self, request: Request) -> None:
        """Charge a request that leaves the queue for what is to be computed before new tokens.

        One that was preempted was charged before: computing again is no service.
        """
        if request.num_charged_tokens is None:
            self._last_left = request.scope.tenant
            request.num_charged_tokens = len(request.output_token_ids)
            self._charge(request, INPUT_WEIGHT * request.num_remaining_tokens)

    def settle(self, requests: Iterable[Request]) -> None:
        """Charge requests that have begun for their new tokens."""
        for request in requests:
            charged = request.num_charged_tokens
            new = len(request.output_token_ids)
            if charged is not None and new > charged:
                request.num_charged_tokens = new
                self._charge(request, OUTPUT_WEIGHT * (new - charged))

    def forget_idle(self, requests: Iterable[Request]) -> None:
        """Forget tenants without requests whose counters would be lifted, if many are known."""
        if len(self._counters) <= self._forget_above:
            return
        active = {request.scope.tenant for request in requests}
        least = min((self[tenant] for tenant in active), default=self[self._last_left])
        kept = {*active, self._last_left}
        counters = self._counters.items()
        self._counters = {t: c for t, c in counters if t in kept or c > least}
        self._forget_above = max(FORGET_ABOVE, 2 * len(self._counters))

    def _charge(self, request: Request, tokens: float) -> None:
        tenant = request.scope.tenant
        self._counters[tenant] = self[tenant] + tokens / request.weight


def bound(max_input_tokens: int, max_tokens_at_once: int) -> float:
    """Return the most by which counters of two tenants of weight 1 drift apart while both wait.

    `max_input_tokens`: of one request. `max_tokens_at_once`: that all running requests can have.
    Theorem 4.4 of the paper: twice the larger of one prompt's charge and of a full batch's output;
    and the credit that one of them came with.
    """
    return CREDIT + 2 * max(INPUT_WEIGHT * max_input_tokens, OUTPUT_WEIGHT * max_tokens_at_once)
