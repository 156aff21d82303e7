"""Ledger: the one book of what all ingress replicas together may admit for each tenant.

Ingresses do not ask it for each request. They hold leases: requests and tokens that were taken
from the tenant's buckets beforehand and are used within LEASE_NS, and places for answers that run.
What a lease leaves comes back with the next message. So in any window of T seconds all ingresses
together admit at most what one bucket lets through in T plus LEASE_NS, however many they are,
whatever messages are lost, late or doubled, and whoever dies:

- what an ingress that died had taken counts as used; rates refill, its places are free again once
  nothing was heard of it for LEASE_NS;
- a ledger that died is followed by one that gives nothing for LEASE_NS, in which the ingresses
  tell what they hold and what was spent of budgets; its buckets then begin empty. Only where no
  ingress knows of an earlier ledger do they begin full.

No clock, no Ray. All methods take the time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.policy.admission import MINUTE_NS, SECOND_NS, Limits
from deployments.policy.bucket import NOTHING_SPENT, Bucket, Spent, day_of

LEASE_NS = 2 * SECOND_NS
FORGET_NS = 600 * SECOND_NS  # for so long a message of an ingress that is gone is known as late
FIRST_SWEEP = 256  # tenants


@dataclass(frozen=True, slots=True)
class Ask:
    """What an ingress needs for a tenant now, would like ahead, and gives back.

    `tokens_over` were used beyond what was reserved for them; `tokens_alone` were admitted without
    the ledger, and are negative where they were fewer than told before. `holding` are the places
    that it keeps: it had given up others before it asked.
    """

    tenant: str
    limits: Limits
    requests: int = 0
    tokens: int = 0
    places: int = 0
    more_requests: int = 0
    more_tokens: int = 0
    more_places: int = 0
    requests_back: int = 0
    tokens_back: int = 0
    tokens_over: int = 0
    tokens_alone: int = 0
    holding: int = 0
    spent: Spent = NOTHING_SPENT  # as the ledger told it last


@dataclass(frozen=True, slots=True)
class Message:
    """`number` grows with each message that is new; one that is sent again keeps its own.

    `epoch` is the ledger that was heard of last, `day` the one to which `tokens_back` belong.
    """

    ingress: str
    number: int
    epoch: str
    day: int
    asks: tuple[Ask, ...]


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease, and what is left in the book after it: the debts of the buckets, free places."""

    tenant: str
    requests: int = 0
    tokens: int = 0
    places: int = 0
    request_debt: int = 0
    token_debt: int = 0
    spent: Spent = NOTHING_SPENT
    free_places: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    number: int
    epoch: str
    is_recovering: bool
    grants: tuple[Grant, ...]


@dataclass(slots=True)
class _Account:
    """The book of one tenant."""

    limits: Limits
    requests: Bucket
    tokens: Bucket
    spent: Spent = NOTHING_SPENT


@dataclass(slots=True)
class _Ingress:
    at_ns: int
    answer: Answer
    holding: dict[str, int] = field(default_factory=dict[str, int])  # places, by tenant


class Ledger:
    """Used by one thread. `spent` is what is known of budgets from before."""

    def __init__(
        self,
        epoch: str,
        now_ns: int,
        grace_ns: int = LEASE_NS,
        spent: Mapping[str, Spent] | None = None,
    ) -> None:
        self.epoch = epoch
        self._began_ns = now_ns
        self._grace_ns = grace_ns
        self._follows_another = False
        self._accounts: dict[str, _Account] = {}
        self._ingresses: dict[str, _Ingress] = {}
        self._num_alive = 1
        self._held: dict[str, int] = {}  # places, by tenant
        self._spent = dict(spent or {})  # of tenants without an account
        self._sweep_at = FIRST_SWEEP

    @property
    def num_accounts(self) -> int:
        return len(self._accounts)

    def held(self, tenant: str) -> int:
        """Count the places that ingresses hold."""
        return self._held.get(tenant, 0)

    def all_spent(self, wall_s: float) -> dict[str, Spent]:
        """Tell what is spent of budgets, to be given to the ledger that follows."""
        day = day_of(wall_s)
        known = self._spent | {
            name: each.spent
            for name, each in self._accounts.items()
            if each.limits.tokens_per_day is not None or each.limits.tokens_per_month is not None
        }
        turned = {name: spent.on(day) for name, spent in known.items()}
        return {name: spent for name, spent in turned.items() if spent.this_month or spent.today}

    def learn(self, spent: Mapping[str, Spent], wall_s: float) -> None:
        """Take into account what an earlier ledger knew of budgets."""
        for tenant, known in spent.items():
            account = self._accounts.get(tenant)
            if account is not None:
                account.spent = account.spent.at_least(known).on(day_of(wall_s))
            else:
                self._spent[tenant] = self._spent.get(tenant, NOTHING_SPENT).at_least(known)

    def take(self, message: Message, now_ns: int, wall_s: float) -> Answer:
        """Book a message and answer it. One that was taken before changes nothing."""
        sender = self._ingresses.get(message.ingress)
        if sender is not None and message.number <= sender.answer.number:
            return sender.answer
        if message.epoch not in ("", self.epoch):
            self._follows_another = True
        is_recovering = now_ns - self._began_ns < self._grace_ns
        if sender is None:
            nothing = Answer(0, self.epoch, is_recovering, ())
            sender = self._ingresses[message.ingress] = _Ingress(now_ns, nothing)
        sender.at_ns = now_ns
        self._let_go(now_ns)
        day = day_of(wall_s)
        grants = [
            self._book(sender, ask, message, now_ns, day, is_recovering) for ask in message.asks
        ]
        sender.answer = Answer(message.number, self.epoch, is_recovering, tuple(grants))
        self._sweep(now_ns)
        return sender.answer

    def _book(
        self,
        sender: _Ingress,
        ask: Ask,
        message: Message,
        now_ns: int,
        day: int,
        is_recovering: bool,
    ) -> Grant:
        self._hold(sender, ask.tenant, ask.holding)
        known = self._spent.get(ask.tenant, NOTHING_SPENT)
        if message.epoch != self.epoch:  # else it may be more than what is left after a return
            known = known.at_least(ask.spent)
        if is_recovering:  # how its buckets begin is not known yet
            self._spent[ask.tenant] = known.on(day).plus(ask.tokens_alone)
            return Grant(ask.tenant, spent=self._spent[ask.tenant])
        account = self._account(ask, known.on(day), now_ns)
        self._give_back(account, ask, message)
        return self._grant(sender, account, ask)

    def _account(self, ask: Ask, known: Spent, now_ns: int) -> _Account:
        account = self._accounts.get(ask.tenant)
        if account is None:
            account = self._accounts[ask.tenant] = _Account(
                ask.limits,
                self._new_bucket(ask.limits.most_requests, now_ns),
                self._new_bucket(ask.limits.most_tokens, now_ns),
                known,
            )
            self._spent.pop(ask.tenant, None)
        account.limits = ask.limits
        account.spent = account.spent.at_least(known)
        account.requests.refill(ask.limits.requests_per_minute or 0, now_ns)
        account.tokens.refill(ask.limits.tokens_per_minute or 0, now_ns)
        return account

    def _new_bucket(self, burst: int | None, now_ns: int) -> Bucket:
        if burst is None or not self._follows_another:
            return Bucket(0, now_ns)
        return Bucket(burst * MINUTE_NS, self._began_ns)  # refilled since this ledger began

    def _give_back(self, account: _Account, ask: Ask, message: Message) -> None:
        """Take back what leases left, if they were this ledger's and of this day."""
        account.tokens.take(ask.tokens_over)
        spent = account.spent.plus(ask.tokens_over + ask.tokens_alone)
        if message.epoch == self.epoch:
            account.requests.take(-ask.requests_back)
            account.tokens.take(-ask.tokens_back)
            if message.day == spent.day:
                spent = spent.plus(-ask.tokens_back)
        account.spent = spent

    def _grant(self, sender: _Ingress, account: _Account, ask: Ask) -> Grant:
        num_requests = self._part(ask.requests, ask.more_requests, _requests_in(account))
        num_tokens = self._part(ask.tokens, ask.more_tokens, _tokens_in(account))
        free = self._free_places(account, ask.tenant)
        num_places = self._part(ask.places, ask.more_places, free)
        account.requests.take(num_requests if ask.limits.requests_per_minute else 0)
        account.tokens.take(num_tokens if ask.limits.tokens_per_minute else 0)
        account.spent = account.spent.plus(num_tokens)
        self._hold(sender, ask.tenant, ask.holding + num_places)
        return Grant(
            ask.tenant,
            num_requests,
            num_tokens,
            num_places,
            account.requests.debt,
            account.tokens.debt,
            account.spent,
            0 if free is None else free - num_places,
        )

    def _part(self, need: int, more: int, there: int | None) -> int:
        """Give what is needed as far as it is there, and ahead a part of the rest: less, the less
        there is, so that the other ingresses find something."""
        if there is None:
            return 0  # unlimited: nothing is counted
        needed = min(need, there)
        return needed + min(more, (there - needed) // (2 * self._num_alive))

    def _free_places(self, account: _Account, tenant: str) -> int | None:
        most = account.limits.max_concurrent_requests
        return None if most is None else max(0, most - self.held(tenant))

    def _hold(self, sender: _Ingress, tenant: str, num: int) -> None:
        more = num - sender.holding.get(tenant, 0)
        if not more:
            return
        for book, left in (
            (sender.holding, num),
            (self._held, self._held.get(tenant, 0) + more),
        ):
            if left:
                book[tenant] = left
            else:
                book.pop(tenant, None)

    def _let_go(self, now_ns: int) -> None:
        """Free the places of ingresses that are silent, and forget them in the end."""
        for name, ingress in list(self._ingresses.items()):
            silent_ns = now_ns - ingress.at_ns
            if silent_ns > LEASE_NS:
                for tenant in list(ingress.holding):
                    self._hold(ingress, tenant, 0)
            if silent_ns > FORGET_NS:
                del self._ingresses[name]
        alive = (i for i in self._ingresses.values() if now_ns - i.at_ns <= LEASE_NS)
        self._num_alive = max(1, sum(1 for _ in alive))

    def _sweep(self, now_ns: int) -> None:
        """Forget tenants whose books are as of one never seen, each time their number doubled."""
        if len(self._accounts) <= self._sweep_at:
            return
        for tenant, account in list(self._accounts.items()):
            account.requests.refill(account.limits.requests_per_minute or 0, now_ns)
            account.tokens.refill(account.limits.tokens_per_minute or 0, now_ns)
            if account.requests.debt or account.tokens.debt or self.held(tenant):
                continue
            if account.spent != NOTHING_SPENT:
                self._spent[tenant] = account.spent
            del self._accounts[tenant]
        self._sweep_at = 2 * len(self._accounts) + FIRST_SWEEP


def _requests_in(account: _Account) -> int | None:
    burst = account.limits.most_requests
    return None if burst is None else account.requests.level(burst)


def _tokens_in(account: _Account) -> int | None:
    """Count the tokens that the rate and both budgets have; None if there is none of them."""
    limits, spent = account.limits, account.spent
    burst = limits.most_tokens
    left = [
        None if burst is None else account.tokens.level(burst),
        None if limits.tokens_per_day is None else limits.tokens_per_day - spent.today,
        None if limits.tokens_per_month is None else limits.tokens_per_month - spent.this_month,
    ]
    known = [each for each in left if each is not None]
    return max(0, min(known)) if known else None
