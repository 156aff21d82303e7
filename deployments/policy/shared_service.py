"""Shared service: replicas tell each other what tenants were given, so that none gains by many.

A replica reports how much each tenant and class was given by its engine since it started, those
that changed most and were not reported yet; the others count what is new in it. A report may come
late, twice, or never: totals make up for what was lost, numbers tell what is old. Numbers of tokens
are those of `engine.scheduler.fairness`, over the tenant's weight.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

FlowTokens = tuple[str, int, float]  # tenant, class, tokens
MAX_REPORTED = 128  # flows in a report; the rest is in later ones
MAX_KNOWN = 4096  # flows of one replica that are remembered: those that changed last
SILENT_S = 60.0  # a replica that was not heard of for so long is forgotten


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """What one replica gave; reports with a higher `number` are newer.

    `flows`: tenant, class, tokens since the replica started, and since the last report of the flow.
    """

    replica_id: str
    number: int
    flows: tuple[tuple[str, int, float, float], ...]


class OwnService:
    """What this replica's engine gave."""

    def __init__(self, replica_id: str) -> None:
        self._replica_id = replica_id
        self._number = 0
        self._totals: OrderedDict[tuple[str, int], float] = OrderedDict()
        self._new: dict[tuple[str, int], float] = {}  # not reported yet

    def add(self, served: Iterable[FlowTokens]) -> None:
        for tenant, rank, tokens in served:
            flow = (tenant, rank)
            self._totals[flow] = self._totals.pop(flow, 0.0) + tokens
            self._new[flow] = self._new.get(flow, 0.0) + tokens
        while len(self._totals) > MAX_KNOWN:
            gone, _ = self._totals.popitem(last=False)
            self._new.pop(gone, None)

    def take_report(self) -> ServiceReport | None:
        """Return what is new; None if nothing is."""
        if not self._new:
            return None
        self._number += 1
        most = sorted(self._new.items(), key=lambda item: -item[1])[:MAX_REPORTED]
        for flow, _ in most:
            del self._new[flow]
        flows = tuple((*flow, self._totals[flow], tokens) for flow, tokens in most)
        return ServiceReport(self._replica_id, self._number, flows)


@dataclass(slots=True)
class _Known:
    heard_s: float
    totals: OrderedDict[tuple[str, int], tuple[int, float]] = field(
        default_factory=OrderedDict[tuple[str, int], tuple[int, float]]
    )


class OthersService:
    """What the other replicas gave, as far as it is known."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def take(self, reports: Iterable[ServiceReport], now_s: float) -> list[FlowTokens]:
        """Return what these reports say that was not known, by flow."""
        new: dict[tuple[str, int], float] = {}
        for report in reports:
            for tenant, rank, tokens in self._news(report, now_s):
                new[tenant, rank] = new.get((tenant, rank), 0.0) + tokens
        self._known = {r: k for r, k in self._known.items() if now_s - k.heard_s < SILENT_S}
        return [(*flow, tokens) for flow, tokens in new.items()]

    def _news(self, report: ServiceReport, now_s: float) -> list[FlowTokens]:
        known = self._known.setdefault(report.replica_id, _Known(now_s))
        known.heard_s = now_s
        news: list[FlowTokens] = []
        for tenant, rank, total, change in report.flows:
            number, before = known.totals.pop((tenant, rank), (0, total - change))
            if report.number > number:
                # A total below the last one was begun anew, as that of a flow long unused is.
                news.append((tenant, rank, total - before if total >= before else change))
                number, before = report.number, total
            known.totals[tenant, rank] = (number, before)
        while len(known.totals) > MAX_KNOWN:
            known.totals.popitem(last=False)
        return news
