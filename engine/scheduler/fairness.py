"""TenantService: what each tenant has been given, so that the one with the least goes next.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). A
tenant is charged for the tokens that are computed for it: those of a prompt when a request begins,
but not what the prefix cache held, and each new one as it comes; and for an adapter that is loaded
for it, as many as the KV cache could hold in its place. Divided by the tenant's weight, this is its
counter. Of tenants that wait, the one with the lowest counter is served next; nobody is made to
wait for one that does not ask. A tenant that comes back after it had nothing waiting is lifted to
the lowest counter of those who wait, less a small credit: a burst of one that sends less than its
share is served at once, and more is not saved up.

So two tenants that both wait all of the time get, in terms of `charge`, equal service by weight.
What may lie between them is bounded by what runs at once, not by how long they have been waiting:
see `bound`. All this holds within each priority class (`classes`): a tenant has a counter in each.
"""

from collections.abc import Iterable, Set

from engine.scheduler.classes import ClassShares, Flow, PriorityClass, first_rank
from engine.scheduler.request import Request

INPUT_WEIGHT = 1.0  # of a prompt's token
OUTPUT_WEIGHT = 2.0  # of a generated one, which takes a step
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0  # of a tenant
# Of service that a tenant may save up: a burst of some requests, or a short answer for each seat.
CREDIT, SEAT_CREDIT = 2000.0, 128.0
FORGET_ABOVE = 1024  # idle tenants are forgotten when more than so many are known


class TenantService:
    """Counters of flows: a tenant's requests of one class. New tokens of running requests count
    when `settle` looks at them."""

    def __init__(self, credit: float = CREDIT) -> None:
        self._credit = credit
        self.classes = ClassShares()
        self._counters: dict[Flow, float] = {}
        self._last_left = {each: Flow("", each) for each in PriorityClass}  # left the queue last
        self._forget_above = FORGET_ABOVE
        self._news: dict[Flow, float] = {}  # charged, and not taken yet
        self._progress = [0.0] * len(PriorityClass)  # charged since others' service was counted

    def __getitem__(self, flow: Flow) -> float:
        """Weighted tokens over the tenant's weight; after `settle`, of all computed so far."""
        return self._counters.get(flow, 0.0)

    def __len__(self) -> int:
        return len(self._counters)

    def order(self, flow: Flow) -> tuple[int, float]:
        """Return what orders flows that wait: the lowest goes first."""
        return self.classes.rank(flow.priority_class), self[flow]

    def running_order(self, request: Request) -> tuple[int, float]:
        """Return the place of a request that has begun, whose prompt is to be computed."""
        flow = request.flow
        if request.keeps_seat:
            return first_rank(flow.priority_class), self[flow]
        return self.order(flow)

    def enter(self, flow: Flow, waiting: Set[Flow]) -> None:
        """Lift a flow that begins to wait beside these others. Settle running requests before."""
        self.classes.note_waiting(waiting)
        least = self._least(flow.priority_class, waiting)
        self._counters[flow] = max(self[flow], least - self._credit)

    def begin(self, request: Request) -> None:
        """Charge a request that leaves the queue for what is to be computed before new tokens.

        One that was preempted was charged before: computing again is no service.
        """
        request.keeps_seat = self.classes.begin(request.priority_class)
        if request.num_charged_tokens is None:
            flow = request.flow
            self._last_left[flow.priority_class] = flow
            request.num_charged_tokens = len(request.output_token_ids)
            self._charge(request, INPUT_WEIGHT * request.num_remaining_tokens)

    def charge_load(self, request: Request, num_tokens: float) -> None:
        """Charge a request for its adapter's load, by the tokens that the KV cache could hold in
        the adapter's place. One that has begun is charged no more: it lost the adapter to others.
        """
        if request.num_charged_tokens is None:
            self._charge(request, INPUT_WEIGHT * num_tokens)

    def settle(self, requests: Iterable[Request]) -> None:
        """Charge requests that have begun for their new tokens."""
        counted: dict[Flow, float] = {}  # summed first: many requests are charged in every step
        given: dict[PriorityClass, float] = {}
        for request in requests:
            charged = request.num_charged_tokens
            new = len(request.output_token_ids)
            if charged is not None and new > charged:
                request.num_charged_tokens = new
                tokens, flow = OUTPUT_WEIGHT * (new - charged), request.flow
                counted[flow] = counted.get(flow, 0.0) + tokens / request.weight
                rank = request.priority_class
                given[rank] = given.get(rank, 0.0) + tokens
        for rank, tokens in given.items():
            self.classes.charge(rank, tokens)
        for flow, tokens in counted.items():
            self._count(flow, tokens)

    def take_news(self) -> dict[Flow, float]:
        """Return what counters were charged with since the last call."""
        news, self._news = self._news, {}
        return news

    def count_elsewhere(self, served: Iterable[tuple[Flow, float]], waiting: Set[Flow]) -> None:
        """Count what other engines gave, so that a tenant on many of them gets no more in all.

        A tenant owes by that no more than twice what was computed here since the last call, from
        where those are who wait: it is not kept waiting long for what nobody here went without.
        """
        debts = [max(self._credit, 2 * progress) for progress in self._progress]
        self._progress = [0.0] * len(PriorityClass)
        for flow, tokens in served:
            rank = flow.priority_class
            others = (self[o] for o in waiting if o.priority_class is rank and o != flow)
            most = max(others, default=self[self._last_left[rank]])
            counter = self[flow]
            self._counters[flow] = max(counter, min(counter + tokens, most + debts[rank]))

    def forget_idle(self, requests: Iterable[Request]) -> None:
        """Forget flows without requests whose counters would be lifted, if many are known."""
        if len(self._counters) <= self._forget_above:
            return
        active = {request.flow for request in requests}
        kept = {*active, *self._last_left.values()}
        least = {each: self._least(each, active) for each in PriorityClass}
        counters = self._counters.items()
        self._counters = {f: c for f, c in counters if f in kept or c > least[f.priority_class]}
        self._news = {f: c for f, c in self._news.items() if f in self._counters}
        self._forget_above = max(FORGET_ABOVE, 2 * len(self._counters))

    def _least(self, priority_class: PriorityClass, flows: Iterable[Flow]) -> float:
        counters = (self[f] for f in flows if f.priority_class is priority_class)
        return min(counters, default=self[self._last_left[priority_class]])

    def _charge(self, request: Request, tokens: float) -> None:
        self.classes.charge(request.priority_class, tokens)
        self._count(request.flow, tokens / request.weight)

    def _count(self, flow: Flow, counted: float) -> None:
        self._counters[flow] = self[flow] + counted
        self._news[flow] = self._news.get(flow, 0.0) + counted
        self._progress[flow.priority_class] += counted


def credit_of(max_num_seqs: int) -> float:
    """Return the credit of an engine with so many seats."""
    return max(CREDIT, SEAT_CREDIT * max_num_seqs)


def bound(max_input_tokens: float, max_tokens_at_once: float, credit: float = CREDIT) -> float:
    """Return the most by which counters of two tenants of weight 1 drift apart while both wait.

    `max_input_tokens`: of one request, with what its adapter's load counts.
    `max_tokens_at_once`: that all running requests can have.
    Theorem 4.4 of the paper: twice the larger of one prompt's charge and of a full batch's output;
    and the credit that one of them came with.
    """
    return credit + 2 * max(INPUT_WEIGHT * max_input_tokens, OUTPUT_WEIGHT * max_tokens_at_once)
