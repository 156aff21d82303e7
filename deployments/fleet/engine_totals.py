"""EngineTotals: add up what engines have counted since their start, so that the sums never fall."""

from dataclasses import fields, replace

from engine.messages import EngineStats

TOTALS = [field.name for field in fields(EngineStats) if field.name.startswith("total_")]


class EngineTotals:
    """The sums over all replicas that have ever reported.

    An engine that is started again begins at zero. What it had counted after its last report is
    lost to the sums.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(TOTALS, 0)
        self._last: dict[str, EngineStats] = {}

    def report(self, replica_id: str, stats: EngineStats) -> None:
        last = self._last.get(replica_id, EngineStats())
        self._last[replica_id] = stats
        for name in TOTALS:
            now, before = getattr(stats, name), getattr(last, name)
            self._sums[name] += now - before if now >= before else now

    def put_into(self, stats: EngineStats) -> EngineStats:
        """Replace the totals of the replicas of the moment by the sums."""
        return replace(stats, **self._sums)
