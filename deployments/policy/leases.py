"""Leases: what one ingress may admit without asking anybody, for all tenants.

Counts down what the ledger has granted, says what to ask it for next, and tells why there is not
enough. A lease's requests and tokens are used within LEASE_NS of the message that asked for them,
or go back. While the ledger does not answer, the ingress is alone: it goes on with its share, the
N-th part of every limit (rounded up) for N ingresses, in buckets of its own that begin full.

No clock, no I/O. All methods take the time: nanoseconds that only grow, and seconds since 1970.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from deployments.policy.admission import (
    CONCURRENCY_RETRY_S,
    MINUTE_NS,
    SECOND_NS,
    Limits,
    Refusal,
)
from deployments.policy.bucket import (
    Bucket,
    day_of,
    seconds_to_day,
    seconds_to_month,
    seconds_until,
)
from deployments.policy.ledger import LEASE_NS, Answer, Ask, Grant, Message

UNKNOWN_PART = 100  # of a budget of which nothing was heard, one in so many tokens is shared


MOST_TIDIED, MOST_LOOKED_AT = 200, 2000  # tenants, by one message
NOTHING_TOLD = Grant("")


@dataclass(frozen=True, slots=True)
class Need:
    requests: int = 0
    tokens: int = 0
    places: int = 0


@dataclass(frozen=True, slots=True)
class Reserved:
    """Tokens that were admitted, and what they were taken from."""

    tokens: int
    epoch: str
    day: int
    is_alone: bool


@dataclass(frozen=True, slots=True)
class Allowance:
    """A limit as an answer's headers show it. `reset_s`: until all of it is there again."""

    limit: int
    remaining: int
    reset_s: float


class _Credit:
    """Requests or tokens of leases, those that end first in front."""

    __slots__ = ("_parts", "total")

    def __init__(self) -> None:
        self.total = 0
        self._parts: deque[tuple[int, int]] = deque()

    def add(self, num: int, ends_ns: int) -> None:
        if num:
            self._parts.append((ends_ns, num))
            self.total += num

    def take(self, num: int) -> None:
        assert num <= self.total, "there is not so much"
        self.total -= num
        while num:
            ends_ns, there = self._parts[0]
            if there > num:
                self._parts[0] = (ends_ns, there - num)
                return
            num -= there
            self._parts.popleft()

    def expired(self, now_ns: int) -> int:
        """Remove what has ended; return how much."""
        num = 0
        while self._parts and self._parts[0][0] <= now_ns:
            num += self._parts.popleft()[1]
        self.total -= num
        return num

    def beyond(self, num: int) -> int:
        """Remove all but so much; return how much."""
        excess = max(0, self.total - num)
        self.take(excess)
        return excess


@dataclass(slots=True)
class _Share:
    """What an ingress alone may admit for a tenant."""

    requests: Bucket
    tokens: Bucket
    budget: int | None = None  # tokens
    outage: int = 0  # which one it is the budget for

    def is_full(self, limits: Limits) -> bool:
        """Tell whether all of what is limited is there, as of the last refill."""
        has_requests = limits.requests_per_minute is None or not self.requests.debt
        return has_requests and (limits.tokens_per_minute is None or not self.tokens.debt)

    def give_back(self, num_tokens: int) -> None:
        self.tokens.take(-num_tokens)
        if self.budget is not None:
            self.budget += num_tokens


@dataclass(slots=True)
class _Account:
    limits: Limits
    requests: _Credit = field(default_factory=_Credit)
    tokens: _Credit = field(default_factory=_Credit)
    places: int = 0
    running: int = 0
    peak: int = 0  # most that ran since the last tidying
    used_requests: int = 0
    used_tokens: int = 0
    need: Need = Need()
    requests_back: int = 0
    tokens_back: int = 0
    tokens_over: int = 0
    tokens_alone: int = 0
    told: Grant = NOTHING_TOLD
    told_ns: int = 0
    share: _Share | None = None

    def expire(self, now_ns: int) -> None:
        self.requests_back += self.requests.expired(now_ns)
        self.tokens_back += self.tokens.expired(now_ns)

    @property
    def has_news(self) -> bool:
        return bool(
            self.requests.total
            or self.tokens.total
            or self.requests_back
            or self.tokens_back
            or self.tokens_over
            or self.tokens_alone
            or self.places
            or self.need != Need()
        )

    def may_be_forgotten(self, day: int) -> bool:
        """What is spent of budgets is kept for a ledger that would follow, until the next day; what
        was admitted alone, until it is there again: a share begins full."""
        is_kept = self.has_news or self.running or (self.told.spent.day >= day and self.budgets)
        return not is_kept and (self.share is None or self.share.is_full(self.limits))

    @property
    def budgets(self) -> bool:
        return (self.limits.tokens_per_day or self.limits.tokens_per_month) is not None


class Leases:
    """Of one ingress of `num_ingresses`. `is_alone`: the ledger does not answer."""

    def __init__(self, ingress: str, num_ingresses: int = 1) -> None:
        self.is_alone = False
        self._ingress = ingress
        self._num_ingresses = num_ingresses
        self._accounts: dict[str, _Account] = {}
        self._needy: set[str] = set()
        self._to_tidy: list[str] = []
        self._epoch = ""
        self._day = 0
        self._num_messages = 0
        self._asked_ns = self._asked_day = 0
        self._heard_ns = 0  # when the last message was written that was answered
        self._outage = 0

    @property
    def has_more_to_tidy(self) -> bool:
        """Tell whether the last message that tidied left tenants out."""
        return bool(self._to_tidy)

    @property
    def num_known(self) -> int:
        return len(self._accounts)

    def is_scarce(self, tenant: str) -> bool:
        """Tell whether the ledger had no free place for the tenant when it was last asked."""
        account = self._accounts[tenant]
        limits = account.limits
        return limits.max_concurrent_requests is not None and not account.told.free_places

    def num_running(self, tenant: str) -> int:
        return self._accounts[tenant].running if tenant in self._accounts else 0

    # ---- admission -----------------------------------------------------------------------

    def take(
        self, tenant: str, limits: Limits, need: Need, now_ns: int, wall_s: float
    ) -> Reserved | None:
        """Take all of what is needed; None, and nothing is taken, if a lease has less."""
        self._turn(wall_s)
        account = self._account(tenant, limits)
        account.expire(now_ns)
        if now_ns - self._heard_ns > LEASE_NS:  # others may have the free places by now
            account.places = min(account.places, account.running)
        if self._missing(account, need) != Need():
            return None
        if limits.requests_per_minute is not None:
            account.requests.take(need.requests)
        if limits.counts_tokens:
            account.tokens.take(need.tokens)
        self._count(account, need)
        return Reserved(need.tokens, self._epoch, self._day, False)

    def take_alone(
        self, tenant: str, limits: Limits, need: Need, now_ns: int, wall_s: float
    ) -> Reserved | None:
        """Take it from this ingress' share. None, and nothing is taken, if that has less."""
        self._turn(wall_s)
        account = self._account(tenant, limits)
        share = self._share_of(account, now_ns)
        if not self._has(account, share, need):
            return None
        share.requests.take(need.requests)
        share.tokens.take(need.tokens)
        if share.budget is not None:
            share.budget -= need.tokens
        account.tokens_alone += need.tokens if limits.counts_tokens else 0
        self._count(account, need)
        return Reserved(need.tokens, self._epoch, self._day, True)

    def want(self, tenant: str, need: Need) -> None:
        """Ask for what is missing of it when the next message is written."""
        account = self._accounts[tenant]
        known = account.need
        account.need = Need(
            known.requests + need.requests,
            known.tokens + need.tokens,
            known.places + need.places,
        )
        self._needy.add(tenant)

    def leave(self, tenant: str, num_places: int) -> None:
        """Count answers as ended."""
        account = self._accounts[tenant]
        assert account.running >= num_places, "more answers ended than began"
        account.running -= num_places

    def settle(self, tenant: str, reserved: Reserved, used: int, wall_s: float) -> None:
        """Give back what was reserved and not used, or count what was used beyond it."""
        self._turn(wall_s)
        account, rest = self._accounts[tenant], reserved.tokens - used
        if not account.limits.counts_tokens:
            return
        if reserved.is_alone:
            account.tokens_alone -= rest
            if account.share is not None:
                account.share.give_back(rest)
        elif rest < 0:
            here = min(-rest, account.tokens.total)
            account.tokens.take(here)
            account.tokens_over += -rest - here
        elif (reserved.epoch, reserved.day) == (self._epoch, self._day):
            account.tokens_back += rest

    def refusal(self, tenant: str, need: Need, now_ns: int, wall_s: float) -> Refusal:
        """Say which limit leaves too little, and for how long."""
        account = self._accounts[tenant]
        limits, missing = account.limits, self._missing(account, need)
        rate, burst = limits.requests_per_minute, limits.most_requests
        if missing.requests and rate is not None and burst is not None:
            debt = _aged(account.told.request_debt, rate, now_ns - account.told_ns)
            after_s = seconds_until(missing.requests, debt, rate, burst)
            return Refusal("requests_per_minute", rate, max(1, after_s))
        if missing.places and limits.max_concurrent_requests is not None:
            most = limits.max_concurrent_requests
            return Refusal("max_concurrent_requests", most, CONCURRENCY_RETRY_S)
        return self._token_refusal(account, missing.tokens, now_ns, wall_s)

    def _token_refusal(
        self, account: _Account, missing: int, now_ns: int, wall_s: float
    ) -> Refusal:
        limits, spent = account.limits, account.told.spent.on(self._day)
        month, day = limits.tokens_per_month, limits.tokens_per_day
        if month is not None and spent.this_month + missing > month:
            return Refusal("tokens_per_month", month, seconds_to_month(wall_s))
        if day is not None and spent.today + missing > day:
            return Refusal("tokens_per_day", day, seconds_to_day(wall_s))
        rate, burst = limits.tokens_per_minute, limits.most_tokens
        if rate is None or burst is None:  # the ledger is not heard, or others hold the rest
            name, value = ("tokens_per_day", day) if day else ("tokens_per_month", month)
            return Refusal(name, value or 0, CONCURRENCY_RETRY_S)
        debt = _aged(account.told.token_debt, rate, now_ns - account.told_ns)
        after_s = seconds_until(missing, debt, rate, burst)
        return Refusal("tokens_per_minute", rate, max(1, after_s))

    # ---- what is left, as far as is known here -------------------------------------------

    def request_allowance(self, tenant: str, now_ns: int) -> Allowance | None:
        account = self._accounts.get(tenant)
        if account is None or account.limits.most_requests is None:
            return None
        rate, burst = account.limits.requests_per_minute or 1, account.limits.most_requests
        debt, told_ns = account.told.request_debt, account.told_ns
        return _allowance(rate, rate, burst, debt, account.requests.total, now_ns - told_ns)

    def token_allowance(self, tenant: str, now_ns: int, wall_s: float) -> Allowance | None:
        """Describe the limit of tokens of which the least is left."""
        account = self._accounts.get(tenant)
        if account is None or not account.limits.counts_tokens:
            return None
        found = self._token_allowances(account, now_ns, wall_s)
        return min(found, key=lambda allowance: allowance.remaining)

    def _token_allowances(
        self, account: _Account, now_ns: int, wall_s: float
    ) -> Iterator[Allowance]:
        limits, credit = account.limits, account.tokens.total
        spent = account.told.spent.on(day_of(wall_s))
        rate, burst = limits.tokens_per_minute, limits.most_tokens
        if rate is not None and burst is not None:
            debt, told_ns = account.told.token_debt, account.told_ns
            yield _allowance(rate, rate, burst, debt, credit, now_ns - told_ns)
        if (most := limits.tokens_per_day) is not None:
            left = min(most, max(0, most - spent.today) + credit)
            yield Allowance(most, left, float(seconds_to_day(wall_s)))
        if (most := limits.tokens_per_month) is not None:
            left = min(most, max(0, most - spent.this_month) + credit)
            yield Allowance(most, left, float(seconds_to_month(wall_s)))

    # ---- the ledger ----------------------------------------------------------------------

    def message(self, now_ns: int, wall_s: float, is_tidying: bool) -> Message | None:
        """Write what to tell the ledger: what is needed, and with `is_tidying` what some tenants
        hold, in turn.

        None if there is nothing, but for an ingress alone, which asks whether it still is. It must
        be answered, or sent again as it is, before the next one.
        """
        self._turn(wall_s)
        names = sorted(self._needy)
        if is_tidying:
            names += self._next_to_tidy(now_ns)
        self._needy.clear()
        accounts = ((name, self._accounts[name]) for name in names)
        asks = tuple(
            self._ask(name, account, now_ns, is_tidying)
            for name, account in accounts
            if account.has_news
        )
        if not asks and not (self.is_alone and is_tidying):
            return None
        self._num_messages += 1
        self._asked_ns, self._asked_day = now_ns, self._day
        return Message(self._ingress, self._num_messages, self._epoch, self._day, asks)

    def _next_to_tidy(self, now_ns: int) -> list[str]:
        """Choose a few tenants, so that a message is written and booked within milliseconds.

        Tenants of which there is nothing to tell are forgotten.
        """
        if not self._to_tidy:
            self._to_tidy = list(self._accounts)
        names: list[str] = []
        for _ in range(min(len(self._to_tidy), MOST_LOOKED_AT)):
            name = self._to_tidy.pop()
            account = self._accounts.get(name)
            if account is None or name in self._needy:
                continue
            if account.share is not None:
                self._share_of(account, now_ns)
            if account.may_be_forgotten(self._day):
                del self._accounts[name]
            elif account.has_news:
                names.append(name)
                if len(names) == MOST_TIDIED:
                    break
        return names

    def accept(self, answer: Answer, now_ns: int) -> bool:
        """Take what the ledger grants; return whether it was the answer that is waited for."""
        if answer.number != self._num_messages:
            return False
        if answer.epoch != self._epoch:
            self._begin_epoch(answer.epoch)
        self._heard_ns = self._asked_ns
        self.set_alone(answer.is_recovering)
        for grant in answer.grants:
            account = self._accounts.get(grant.tenant)
            if account is None:
                continue
            ends_ns = self._asked_ns + LEASE_NS
            account.requests.add(grant.requests, ends_ns)
            if self._asked_day == self._day:
                account.tokens.add(grant.tokens, ends_ns)
            account.places += grant.places
            account.told, account.told_ns = grant, now_ns
        return True

    def set_alone(self, is_alone: bool) -> None:
        self._outage += is_alone and not self.is_alone
        self.is_alone = is_alone

    def _ask(self, name: str, account: _Account, now_ns: int, is_tidying: bool) -> Ask:
        account.expire(now_ns)
        ahead = Need(2 * account.used_requests, 2 * account.used_tokens, account.running)
        account.used_requests //= 2
        account.used_tokens //= 2
        if is_tidying and account.need == Need():  # else somebody is about to use it
            account.requests_back += account.requests.beyond(ahead.requests)
            account.tokens_back += account.tokens.beyond(ahead.tokens)
            account.places = min(account.places, max(account.running, account.peak))
            account.peak = account.running
        need, account.need = self._missing(account, account.need), Need()
        if account.limits.max_concurrent_requests is None:
            account.places = 0
        ask = Ask(
            name,
            account.limits,
            need.requests,
            need.tokens,
            need.places,
            max(0, ahead.requests - account.requests.total),
            max(0, ahead.tokens - account.tokens.total),
            ahead.places if need.places else 0,
            account.requests_back,
            account.tokens_back,
            account.tokens_over,
            account.tokens_alone,
            account.places,
            account.told.spent,
        )
        account.requests_back = account.tokens_back = 0
        account.tokens_over = account.tokens_alone = 0
        return ask

    def _begin_epoch(self, epoch: str) -> None:
        """Give up the leases of a ledger that is gone, but for places: answers run in them."""
        for account in self._accounts.values():
            self._drop_leases(account)
            account.requests_back = 0
            account.requests = _Credit()
        self._epoch = epoch

    def _turn(self, wall_s: float) -> None:
        """Give up the tokens of a day that is over."""
        day = day_of(wall_s)
        if day <= self._day:
            return
        self._day = day
        for account in self._accounts.values():
            self._drop_leases(account)

    def _drop_leases(self, account: _Account) -> None:
        account.tokens_back = 0
        account.tokens = _Credit()

    def _account(self, tenant: str, limits: Limits) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(limits)
        account.limits = limits
        return account

    def _missing(self, account: _Account, need: Need) -> Need:
        limits, most = account.limits, account.limits.max_concurrent_requests
        places = 0 if most is None else account.running + need.places - account.places
        return Need(
            0
            if limits.requests_per_minute is None
            else max(0, need.requests - account.requests.total),
            max(0, need.tokens - account.tokens.total) if limits.counts_tokens else 0,
            max(0, places) if need.places else 0,
        )

    def _count(self, account: _Account, need: Need) -> None:
        account.running += need.places
        account.peak = max(account.peak, account.running)
        account.used_requests += need.requests
        account.used_tokens += need.tokens

    # ---- alone ---------------------------------------------------------------------------

    def _part(self, num: int) -> int:
        return -(-num // self._num_ingresses)

    def _share_of(self, account: _Account, now_ns: int) -> _Share:
        share = account.share
        if share is None:
            share = account.share = _Share(Bucket(0, now_ns), Bucket(0, now_ns))
        if share.outage != self._outage:
            share.outage, share.budget = self._outage, self._budget_of(account)
        share.requests.refill(self._part(account.limits.requests_per_minute or 0), now_ns)
        share.tokens.refill(self._part(account.limits.tokens_per_minute or 0), now_ns)
        return share

    def _budget_of(self, account: _Account) -> int | None:
        limits, is_known = account.limits, account.told.spent.day > 0
        spent = account.told.spent.on(self._day)
        left = [
            self._part(max(0, most - used) if is_known else -(-most // UNKNOWN_PART))
            for most, used in (
                (limits.tokens_per_day, spent.today),
                (limits.tokens_per_month, spent.this_month),
            )
            if most is not None
        ]
        return min(left) if left else None

    def _has(self, account: _Account, share: _Share, need: Need) -> bool:
        limits = account.limits
        requests, tokens = limits.most_requests, limits.most_tokens
        if requests is not None and share.requests.level(self._part(requests)) < need.requests:
            return False
        if tokens is not None and share.tokens.level(self._part(tokens)) < need.tokens:
            return False
        if share.budget is not None and share.budget < need.tokens:
            return False
        most = limits.max_concurrent_requests
        places = 0 if most is None else max(account.places, self._part(most))
        return most is None or not need.places or account.running + need.places <= places


def _aged(debt: int, rate: int, elapsed_ns: int) -> int:
    return max(0, debt - rate * max(0, elapsed_ns))


def _allowance(
    limit: int, rate: int, burst: int, debt: int, credit: int, elapsed_ns: int
) -> Allowance:
    debt = _aged(debt, rate, elapsed_ns)
    level = max(0, (burst * MINUTE_NS - debt) // MINUTE_NS)
    missing = max(0, debt - credit * MINUTE_NS)
    return Allowance(limit, min(burst, level + credit), missing / (rate * SECOND_NS))
