"""UsageCollector: how the records of usage of one ingress fare."""

from collections.abc import Callable, Iterable

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from deployments.usage.writer import UsageCounts

COUNTERS: dict[str, tuple[Callable[[UsageCounts], float], str]] = {
    "reef_usage_records": (lambda c: c.written, "Records of usage that are on disk."),
    "reef_usage_lost_records": (
        lambda c: c.lost,
        "Requests that were served without a record, because the log could not be written.",
    ),
    "reef_usage_write_failures": (
        lambda c: c.write_failures,
        "Times that records could not be written; they wait in memory.",
    ),
    "reef_usage_upload_failures": (
        lambda c: c.upload.failures,
        "Times that records could not be uploaded; they wait on disk.",
    ),
    "reef_usage_damaged_lines": (
        lambda c: c.upload.damaged_lines,
        "Lines of the log that have changed on disk; their file was kept.",
    ),
    "reef_usage_recovered_records": (
        lambda c: c.upload.recovered_records,
        "Records of requests of ingresses that were killed.",
    ),
}
GAUGES: dict[str, tuple[Callable[[UsageCounts], float], str]] = {
    "reef_usage_waiting_records": (
        lambda c: c.waiting,
        "Requests that run, or whose record is not on disk yet.",
    ),
    "reef_usage_spool_bytes": (
        lambda c: c.spool_bytes,
        "Records on this machine's disk that are not uploaded yet.",
    ),
}


class UsageCollector(Collector):
    def __init__(self, counts: Callable[[], UsageCounts]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        counts = self._counts()
        for name, (read, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=read(counts))
        for name, (read, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=read(counts))
