"""The ledger and the leases of several ingresses, under delays, losses, doubles and deaths.

Messages travel by hand: each may be late, lost, doubled, and its answer too. What was admitted is
counted again from the list of all admissions.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.policy.admission import DAY_S, MINUTE_NS, SECOND_NS, Limits, Refusal
from deployments.policy.bucket import Spent, seconds_to_day, seconds_to_month
from deployments.policy.leases import Leases, Need, Reserved
from deployments.policy.ledger import LEASE_NS, Answer, Ask, Ledger, Message

START_NS = 50 * SECOND_NS
START_S = 1_900_000_000.0
LIMITS = Limits(120, 5, 6000, 7, 400, 3000, 9000)


@dataclass(eq=False)
class Running:
    at_ns: int
    ingress: int
    reserved: Reserved
    used: int | None = None  # None: it runs
    is_excused: bool = False  # its ingress was silent for so long that its place was given away
    is_over: bool = False
    is_extra: bool = False  # a further answer of the same request


@dataclass
class Ingress:
    leases: Leases
    waiting: list[Need] = field(default_factory=list[Need])
    message: Message | None = None  # the one that is not answered yet


class World:
    """Several ingresses and a ledger, in virtual time."""

    def __init__(self, num_ingresses: int) -> None:
        self.now_ns, self.num_deaths, self.num_names = START_NS, 0, 0
        self.num_ingresses = num_ingresses
        self.ledger = Ledger("ledger-0", self.now_ns, grace_ns=0)
        self.ingresses = [self._new() for _ in range(num_ingresses)]
        self.to_ledger: list[Message] = []
        self.to_ingress: list[tuple[int, str, Answer]] = []
        self.admitted: list[Running] = []

    def _new(self) -> Ingress:
        self.num_names += 1
        return Ingress(Leases(f"ingress-{self.num_names}", self.num_ingresses))

    @property
    def wall_s(self) -> float:
        return START_S + (self.now_ns - START_NS) / 1e9

    def do(self, what: str, which: int, amount: int) -> None:
        at = which % len(self.ingresses)
        getattr(self, what)(at, which, amount)
        for ingress, known in enumerate(self.ingresses):
            if self.now_ns - known.leases._heard_ns > LEASE_NS:  # pyright: ignore
                for each in self.running:
                    each.is_excused |= each.ingress == ingress

    @property
    def running(self) -> list[Running]:
        return [each for each in self.admitted if not each.is_over]

    def wait(self, at: int, which: int, amount: int) -> None:
        self.now_ns += amount * SECOND_NS // 40

    def request(self, at: int, which: int, amount: int) -> None:
        ingress, need = self.ingresses[at], Need(1, amount, 1 + which % 2)
        if not self._admit(at, need) and not ingress.leases.is_alone:
            ingress.leases.want("a", need)
            ingress.waiting.append(need)

    def _admit(self, at: int, need: Need) -> bool:
        leases = self.ingresses[at].leases
        found = leases.take("a", LIMITS, need, self.now_ns, self.wall_s)
        if found is None and leases.is_alone:
            found = leases.take_alone("a", LIMITS, need, self.now_ns, self.wall_s)
        if found is not None:
            self.admitted += [Running(self.now_ns, at, found)]
            self.admitted += [
                Running(self.now_ns, at, Reserved(0, "", 0, found.is_alone), 0, is_extra=True)
                for _ in range(need.places - 1)
            ]
        return found is not None

    def end(self, at: int, which: int, amount: int) -> None:
        if not self.running:
            return
        each = self.running[which % len(self.running)]
        leases, each.is_over = self.ingresses[each.ingress].leases, True
        if each.used is None:
            each.used = min(each.reserved.tokens, amount)
            leases.settle("a", each.reserved, each.used, self.wall_s)
        leases.leave("a", 1)

    def send(self, at: int, which: int, amount: int) -> None:
        ingress = self.ingresses[at]
        if ingress.message is None:
            ingress.message = ingress.leases.message(self.now_ns, self.wall_s, amount % 2 == 0)
        if ingress.message is not None:
            self.to_ledger.append(ingress.message)

    def hear(self, at: int, which: int, amount: int) -> None:
        """The ledger takes a message; one in four comes again later."""
        if not self.to_ledger:
            return
        message = self.to_ledger.pop(which % len(self.to_ledger))
        if amount % 4 == 0:
            self.to_ledger.append(message)
        answer = self.ledger.take(message, self.now_ns, self.wall_s)
        for at, ingress in enumerate(self.ingresses):
            if ingress.message is not None and ingress.message.ingress == message.ingress:
                self.to_ingress.append((at, message.ingress, answer))

    def answer(self, at: int, which: int, amount: int) -> None:
        if not self.to_ingress:
            return
        at, name, answer = self.to_ingress.pop(which % len(self.to_ingress))
        if amount % 4 == 0:
            self.to_ingress.append((at, name, answer))
        ingress = self.ingresses[at]
        if ingress.message is None or ingress.message.ingress != name:
            return
        if ingress.leases.accept(answer, self.now_ns):
            ingress.message = None
            waiting, ingress.waiting = ingress.waiting, []
            for need in waiting:
                self._admit(at, need)

    def swift(self, at: int, which: int, amount: int) -> None:
        """A whole exchange at once, as it mostly goes."""
        self.send(at, which, amount)
        ingress = self.ingresses[at]
        if ingress.message is not None:
            answer = self.ledger.take(ingress.message, self.now_ns, self.wall_s)
            self.to_ingress.append((at, ingress.message.ingress, answer))
            self.answer(at, len(self.to_ingress) - 1, 1)

    def lose(self, at: int, which: int, amount: int) -> None:
        if self.to_ledger:
            self.to_ledger.pop(which % len(self.to_ledger))

    def give_up(self, at: int, which: int, amount: int) -> None:
        if self.ingresses[at].message is not None:
            self.ingresses[at].leases.set_alone(True)
            self.ingresses[at].waiting.clear()

    def kill_ingress(self, at: int, which: int, amount: int) -> None:
        self.ingresses[at] = self._new()
        for each in self.running:
            each.is_over |= each.ingress == at

    def kill_ledger(self, at: int, which: int, amount: int) -> None:
        self.num_deaths += 1
        kept = self.ledger.all_spent(self.wall_s)
        self.ledger = Ledger(f"ledger-{self.num_deaths}", self.now_ns, LEASE_NS, kept)

    # ---- the count -----------------------------------------------------------------------

    def check(self) -> None:
        leased = [each for each in self.admitted if not each.reserved.is_alone]
        held = [e for e in leased if not e.is_over and not e.is_excused]
        assert len(held) <= (LIMITS.max_concurrent_requests or 0)
        for tokens_of, rate, burst in (
            (_requests, LIMITS.requests_per_minute, LIMITS.most_requests),
            (_tokens, LIMITS.tokens_per_minute, LIMITS.most_tokens),
        ):
            assert rate is not None and burst is not None
            self._check_windows(leased, tokens_of, rate, burst * (1 + self.num_deaths))
            for at in range(self.num_ingresses):
                alone = [e for e in self.admitted if e.reserved.is_alone and e.ingress == at]
                part, most = -(-rate // self.num_ingresses), -(-burst // self.num_ingresses)
                if not self.num_names > self.num_ingresses:  # nobody has died
                    self._check_windows(alone, tokens_of, part, most, lease_ns=0)
        if not any(e.reserved.is_alone for e in self.admitted):
            assert sum(map(_tokens, leased)) <= (LIMITS.tokens_per_day or 0)

    def _check_windows(
        self, found: list[Running], amount_of, rate: int, burst: int, lease_ns: int = LEASE_NS
    ) -> None:
        for first in range(len(found)):
            num = 0
            for each in found[first:]:
                num += amount_of(each)
                window_ns = each.at_ns - found[first].at_ns + lease_ns
                assert num * MINUTE_NS <= burst * MINUTE_NS + rate * window_ns


def _requests(each: Running) -> int:
    return 0 if each.is_extra else 1


def _tokens(each: Running) -> int:
    return each.reserved.tokens if each.used is None else each.used


COMMON = ["wait", "request", "request", "end", "swift", "swift", "send", "hear", "answer", "lose"]
DEATHS = ["kill_ingress", "kill_ledger", "give_up"]


def steps(names: list[str]) -> st.SearchStrategy[list[tuple[str, int, int]]]:
    one = st.tuples(st.sampled_from(names), st.integers(0, 11), st.integers(0, 90))
    return st.lists(one, min_size=1, max_size=120)


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 4), steps([*COMMON, "kill_ingress"]))
def test_all_ingresses_together_admit_what_one_bucket_would_and_a_lease_more(
    num_ingresses: int, actions: list[tuple[str, int, int]]
) -> None:
    world = World(num_ingresses)
    for action in actions:
        world.do(*action)
    world.check()


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 4), steps([*COMMON, *COMMON, *DEATHS]))
def test_a_ledger_that_dies_costs_a_burst_and_an_ingress_alone_keeps_to_its_share(
    num_ingresses: int, actions: list[tuple[str, int, int]]
) -> None:
    world = World(num_ingresses)
    for action in actions:
        world.do(*action)
    world.check()


# ---- by hand -------------------------------------------------------------------------------


def exchange(ledger: Ledger, leases: Leases, now_ns: int, is_tidying: bool = False) -> Answer:
    message = leases.message(now_ns, START_S, is_tidying)
    assert message is not None
    answer = ledger.take(message, now_ns, START_S)
    assert leases.accept(answer, now_ns)
    return answer


def admits(
    ledger: Ledger, leases: Leases, limits: Limits, need: Need, now_ns: int = START_NS
) -> Reserved | Refusal:
    found = leases.take("a", limits, need, now_ns, START_S)
    if found is None:
        leases.want("a", need)
        exchange(ledger, leases, now_ns)
        found = leases.take("a", limits, need, now_ns, START_S)
    return found or leases.refusal("a", need, now_ns, START_S)


def test_each_limit_refuses_until_the_second_at_which_it_has_room() -> None:
    ledger, leases = Ledger("l", START_NS, 0), Leases("i")
    limits = Limits(requests_per_minute=60, request_burst=2, tokens_per_minute=600, token_burst=100)
    for _ in range(2):
        assert isinstance(admits(ledger, leases, limits, Need(requests=1)), Reserved)
    assert admits(ledger, leases, limits, Need(requests=1)) == Refusal("requests_per_minute", 60, 1)
    assert isinstance(admits(ledger, leases, limits, Need(tokens=90)), Reserved)
    assert admits(ledger, leases, limits, Need(tokens=60)) == Refusal("tokens_per_minute", 600, 5)
    later_ns = START_NS + 5 * SECOND_NS
    assert isinstance(admits(ledger, leases, limits, Need(tokens=60), later_ns), Reserved)


def test_budgets_of_a_day_and_of_a_month_refuse_until_these_are_over() -> None:
    ledger, leases = Ledger("l", START_NS, 0), Leases("i")
    need = Need(tokens=60)
    for limits, name, after_s in (
        (Limits(tokens_per_day=100), "tokens_per_day", seconds_to_day(START_S)),
        (Limits(tokens_per_month=100), "tokens_per_month", seconds_to_month(START_S)),
    ):
        if name == "tokens_per_day":
            assert isinstance(admits(ledger, leases, limits, need), Reserved)
        assert admits(ledger, leases, limits, need) == Refusal(name, 100, after_s)
        assert after_s < 32 * DAY_S
    tomorrow_s = START_S + seconds_to_day(START_S)
    limits = Limits(tokens_per_day=100)
    assert leases.take("a", limits, need, START_NS, tomorrow_s) is None
    leases.want("a", need)
    message = leases.message(START_NS, tomorrow_s, False)
    assert message is not None
    leases.accept(ledger.take(message, START_NS, tomorrow_s), START_NS)
    assert leases.take("a", limits, need, START_NS, tomorrow_s) is not None


def test_what_was_reserved_and_not_used_can_be_used_and_what_was_used_beyond_is_owed() -> None:
    ledger, leases = Ledger("l", START_NS, 0), Leases("i")
    limits = Limits(tokens_per_day=100)
    first = admits(ledger, leases, limits, Need(tokens=90))
    assert isinstance(first, Reserved)
    assert isinstance(admits(ledger, leases, limits, Need(tokens=60)), Refusal)
    leases.settle("a", first, 30, START_S)
    second = admits(ledger, leases, limits, Need(tokens=60))
    assert isinstance(second, Reserved)
    leases.settle("a", second, 70, START_S)
    assert isinstance(admits(ledger, leases, limits, Need(tokens=1)), Refusal)
    assert ledger.all_spent(START_S)["a"].today == 100


def test_leases_are_for_batches_and_what_is_idle_goes_back() -> None:
    ledger = Ledger("l", START_NS, 0)
    busy, idle = Leases("busy", 2), Leases("idle", 2)
    limits = Limits(requests_per_minute=600)
    num_asked = 0
    for _ in range(100):
        if busy.take("a", limits, Need(requests=1), START_NS, START_S) is None:
            num_asked += 1
            assert isinstance(admits(ledger, busy, limits, Need(requests=1)), Reserved)
    assert num_asked < 12, "most requests ask nobody"
    left = sum(
        isinstance(admits(ledger, idle, limits, Need(requests=1)), Reserved) for _ in range(600)
    )
    for _ in range(8):
        for leases in (busy, idle):
            message = leases.message(START_NS, START_S, True)
            if message is not None:
                leases.accept(ledger.take(message, START_NS, START_S), START_NS)
    left += sum(
        isinstance(admits(ledger, idle, limits, Need(requests=1)), Reserved) for _ in range(600)
    )
    assert left == 500, "all that was left, and nothing more"


def test_an_ingress_alone_asks_whether_it_still_is_and_keeps_to_its_share_meanwhile() -> None:
    """Requests alone are nothing to tell the ledger of: each tidying asks it nevertheless."""
    ledger, leases = Ledger("l", START_NS), Leases("i", 2)
    limits, need = Limits(requests_per_minute=60, max_concurrent_requests=9), Need(1, 0, 1)
    leases.take("a", limits, need, START_NS, START_S)
    leases.want("a", need)
    exchange(ledger, leases, START_NS)
    num_admitted, now_ns = 0, START_NS
    while leases.is_alone:
        assert leases.message(now_ns, START_S, False) is None
        for _ in range(40):
            if leases.take_alone("a", limits, need, now_ns, START_S) is not None:
                num_admitted += 1
                leases.leave("a", 1)
        now_ns += SECOND_NS // 2
        exchange(ledger, leases, now_ns, is_tidying=True)
    assert now_ns - START_NS == LEASE_NS
    assert 30 <= num_admitted <= 31, "half of the burst, and what half of the rate refills"


def test_what_a_waiting_request_counts_on_is_not_given_back_beneath_it() -> None:
    ledger, leases = Ledger("l", START_NS, 0), Leases("i", 2)
    limits, need = Limits(requests_per_minute=600, max_concurrent_requests=4), Need(1, 0, 1)
    assert isinstance(admits(ledger, leases, limits, need), Reserved)
    leases.leave("a", 1)
    exchange(ledger, leases, START_NS, is_tidying=True)
    for later_ns in (1, SECOND_NS, LEASE_NS):  # the place is idle, the lease of requests ends
        now_ns = START_NS + later_ns
        while leases.take("a", limits, need, now_ns, START_S) is not None:
            leases.leave("a", 1)
        leases.want("a", need)
        exchange(ledger, leases, now_ns, is_tidying=True)
        assert leases.take("a", limits, need, now_ns, START_S) is not None
        leases.leave("a", 1)


def test_places_of_an_ingress_that_is_silent_are_free_again() -> None:
    ledger, first, second = Ledger("l", START_NS, 0), Leases("1", 2), Leases("2", 2)
    limits = Limits(max_concurrent_requests=1)
    assert isinstance(admits(ledger, first, limits, Need(places=1)), Reserved)
    assert isinstance(admits(ledger, second, limits, Need(places=1)), Refusal)
    later_ns = START_NS + LEASE_NS + 1
    assert isinstance(admits(ledger, second, limits, Need(places=1), later_ns), Reserved)


def test_a_ledger_that_follows_another_learns_places_and_budgets_and_begins_empty() -> None:
    old, leases = Ledger("old", START_NS, 0), Leases("i", 2)
    limits = Limits(60, 4, 600, tokens_per_day=1000)
    need = Need(1, 50, 3)
    assert isinstance(admits(old, leases, limits, need), Reserved)
    new = Ledger("new", START_NS, LEASE_NS)
    assert exchange(new, leases, START_NS, True).is_recovering and leases.is_alone
    now_ns = START_NS + LEASE_NS
    assert not exchange(new, leases, now_ns, True).is_recovering
    assert new.held("a") == 3
    assert new.all_spent(START_S)["a"].today == 60, "ten more are granted ahead"
    told = leases.token_allowance("a", now_ns, START_S)
    assert told is not None and told.remaining == 20, "two seconds of 600 in a minute"


def test_a_message_that_comes_twice_counts_once() -> None:
    ledger = Ledger("l", START_NS, 0)
    ask = Ask("a", Limits(requests_per_minute=10), requests=4, requests_back=0)
    message = Message("i", 1, "l", 0, (ask,))
    first = ledger.take(message, START_NS, START_S)
    assert ledger.take(message, START_NS, START_S) == first
    again = ledger.take(Message("i", 2, "l", 0, (ask,)), START_NS, START_S)
    assert again.grants[0].request_debt == 8 * MINUTE_NS


def test_tenants_that_went_away_are_forgotten_by_the_ledger() -> None:
    ledger, leases = Ledger("l", START_NS, 0), Leases("i")
    for number in range(3000):
        now_ns = START_NS + number * MINUTE_NS
        need = Need(requests=1)
        assert leases.take(f"{number}", Limits(1), need, now_ns, START_S) is None
        leases.want(f"{number}", need)
        exchange(ledger, leases, now_ns)
        assert leases.take(f"{number}", Limits(1), need, now_ns, START_S) is not None
        leases.message(now_ns, START_S, True)
        assert ledger.num_accounts <= 1024 and leases.num_known <= 2


@pytest.mark.parametrize(
    ("mine", "theirs", "both"),
    [
        (Spent(10, 5, 50), Spent(10, 7, 40), Spent(10, 7, 50)),
        (Spent(11, 5, 50), Spent(10, 70, 60), Spent(11, 5, 60)),
        (Spent(31, 5, 50), Spent(30, 70, 60), Spent(31, 5, 50)),
    ],
)
def test_two_views_of_what_is_spent_are_combined(mine: Spent, theirs: Spent, both: Spent) -> None:
    assert mine.at_least(theirs) == both == theirs.at_least(mine)
