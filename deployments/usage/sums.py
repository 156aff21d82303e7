"""Sums of usage by tenant, adapter, version, day and other fields, and what they cost."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

from deployments.usage.prices import Prices, add_costs
from deployments.usage.record import UsageRecord
from deployments.usage.spool import DAY_S, day_of


class _Days:
    """Days of times, in UTC; each is written once."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def __call__(self, record: UsageRecord) -> str:
        number = int(record.time_s // DAY_S)
        if number not in self._names:
            self._names[number] = day_of(number * DAY_S)
        return self._names[number]


# What sums can be by: how a record's value is read. The base model's adapter is "".
FIELDS: dict[str, Callable[[UsageRecord], str | int]] = {
    "tenant": lambda r: r.tenant,
    "key": lambda r: r.key_id,
    "adapter": lambda r: r.adapter or "",
    "version": lambda r: r.version,
    "digest": lambda r: r.digest,
    "model": lambda r: r.model,
    "day": _Days(),
    "route": lambda r: r.route,
    "class": lambda r: r.price_class,
    "priority": lambda r: r.priority_class,
    "status": lambda r: r.status,
}
COUNTS = (
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "reasoning_tokens",
    "load_bytes",
)
Group = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Sum:
    """`counts` are those of COUNTS; `cost` is None without prices."""

    group: Group
    counts: tuple[int, ...]
    cost: Decimal | None


class Sums:
    """Memory follows the number of different groups, not that of records."""

    def __init__(self, by: Sequence[str]) -> None:
        self._readers = [FIELDS[name] for name in by]
        self._counts: dict[tuple[Group, str], list[int]] = {}  # by group and price class

    def add(self, record: UsageRecord) -> None:
        group = tuple([read(record) for read in self._readers])
        counts = self._counts.get((group, record.price_class))
        if counts is None:
            counts = self._counts[group, record.price_class] = [0] * len(COUNTS)
        counts[0] += 1
        counts[1] += record.prompt_tokens
        counts[2] += record.cached_tokens
        counts[3] += record.output_tokens
        counts[4] += record.reasoning_tokens
        counts[5] += record.load_bytes

    def rows(self, prices: Prices | None = None) -> Iterator[Sum]:
        """Yield the groups in order. Raises NoSuchPrice."""
        merged: dict[Group, tuple[list[int], Decimal]] = {}
        for (group, name), counts in self._counts.items():
            total, cost = merged.get(group, ([0] * len(COUNTS), Decimal(0)))
            if prices is not None and any(counts[1:]):
                _, prompt, cached, output, _, load = counts
                more = prices.price(name).cost(prompt, cached, output, load)
                cost = add_costs([cost, more])
            merged[group] = [a + b for a, b in zip(total, counts, strict=True)], cost
        for group in sorted(merged, key=lambda each: [(str(type(v)), v) for v in each]):
            counts, cost = merged[group]
            yield Sum(group, tuple(counts), None if prices is None else cost)


def sum_up(
    records: Iterable[UsageRecord], by: Sequence[str], since_s: float, until_s: float
) -> Sums:
    """Add what arrived from `since_s` on and before `until_s`."""
    sums = Sums(by)
    for record in records:
        if since_s <= record.time_s < until_s:
            sums.add(record)
    return sums
