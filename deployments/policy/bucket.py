"""Bucket: a rate with a burst, in integers; Spent: tokens of a day and of a month.

A refusal names exactly when a retry would succeed, so nothing is rounded on the way.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil

from deployments.policy.admission import DAY_S, MINUTE_NS, SECOND_NS


@dataclass(slots=True)
class Bucket:
    """`debt` is what is missing from a full bucket at `at_ns`: an item adds MINUTE_NS, and each
    nanosecond pays back the rate. It is more than the whole bucket where more was used than was
    there. A clock that goes back pays nothing."""

    debt: int = 0
    at_ns: int = 0

    def refill(self, rate: int, now_ns: int) -> None:
        self.debt = max(0, self.debt - rate * max(0, now_ns - self.at_ns))
        self.at_ns = max(self.at_ns, now_ns)

    def level(self, burst: int) -> int:
        """Count the whole items that are there, as of the last refill."""
        return max(0, (burst * MINUTE_NS - self.debt) // MINUTE_NS)

    def take(self, num: int) -> None:
        """Take items, more than there are if need be; a negative number gives them back."""
        self.debt = max(0, self.debt + num * MINUTE_NS)


def seconds_until(num: int, debt: int, rate: int, burst: int) -> int:
    """Count the whole seconds until a bucket with this debt holds so many items."""
    missing = debt + num * MINUTE_NS - burst * MINUTE_NS
    return max(0, -(-missing // (rate * SECOND_NS)))


@dataclass(frozen=True, slots=True)
class Spent:
    """Tokens that a tenant has been given in a UTC day, and in its month."""

    day: int = 0  # since 1970
    today: int = 0
    this_month: int = 0

    def on(self, day: int) -> "Spent":
        """Return what is spent on a later day; an earlier one is taken for the same."""
        if day <= self.day:
            return self
        return Spent(day, 0, self.this_month if month_of(day) == month_of(self.day) else 0)

    def plus(self, num: int) -> "Spent":
        """Count more tokens; a negative number gives them back."""
        return Spent(self.day, max(0, self.today + num), max(0, self.this_month + num))

    def at_least(self, other: "Spent") -> "Spent":
        """Combine what two have seen of the same tokens."""
        day = max(self.day, other.day)
        mine, theirs = self.on(day), other.on(day)
        return Spent(day, max(mine.today, theirs.today), max(mine.this_month, theirs.this_month))


NOTHING_SPENT = Spent()


def day_of(wall_s: float) -> int:
    return int(wall_s // DAY_S)


def month_of(day: int) -> int:
    date = datetime.fromtimestamp(day * DAY_S, UTC)
    return date.year * 12 + date.month


def seconds_to_day(wall_s: float) -> int:
    """Count the seconds until the next UTC day, rounded up."""
    return max(1, ceil((day_of(wall_s) + 1) * DAY_S - wall_s))


def seconds_to_month(wall_s: float) -> int:
    """Count the seconds until the next UTC month, rounded up."""
    date = datetime.fromtimestamp(wall_s, UTC)
    year, month = (date.year + 1, 1) if date.month == 12 else (date.year, date.month + 1)
    return max(1, ceil(datetime(year, month, 1, tzinfo=UTC).timestamp() - wall_s))
