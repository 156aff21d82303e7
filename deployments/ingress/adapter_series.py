"""AdapterSeries: counters and histograms by adapter, written as Prometheus' text by themselves.

prometheus_client would write them too, but takes half a second for two hundred adapters, during
which no stream goes on. Here what has not changed since the last scrape is not written again.
"""

import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

OTHER = "other"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
IDLE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. Without bounds it is a counter."""

    name: str
    help: str
    bounds: tuple[float, ...] = ()
    label: str = "adapter"

    def head(self) -> str:
        if not self.bounds:
            name = f"{self.name}_total"
            return f"# HELP {name} {self.help}\n# TYPE {name} counter\n"
        return f"# HELP {self.name} {self.help}\n# TYPE {self.name} histogram\n"

    def lines(self, adapter: str, figures: "Figures") -> str:
        label = f'{self.label}="{_escape(adapter)}"'
        if not self.bounds:
            return f"{self.name}_total{{{label}}} {figures.sum}\n"
        total, parts = 0, list[str]()
        for bound, count in zip((*self.bounds, "+Inf"), figures.counts, strict=True):
            total += count
            parts.append(f'{self.name}_bucket{{{label},le="{bound}"}} {float(total)}\n')
        parts.append(f"{self.name}_count{{{label}}} {float(total)}\n")
        parts.append(f"{self.name}_sum{{{label}}} {figures.sum}\n")
        return "".join(parts)


class Figures:
    """What one adapter has in one family."""

    __slots__ = ("counts", "sum", "text")

    def __init__(self, family: Family) -> None:
        self.counts = [0] * (len(family.bounds) + 1)
        self.sum = 0.0
        self.text: str | None = None  # as it was last written, None once it has changed

    def add(self, counts: Sequence[int], total: float) -> None:
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.sum += total
        self.text = None


class AdapterSeries:
    """The figures of at most `most` adapters; those of all others are added to one label.

    An adapter without traffic for an hour makes room for a new one, and what it had is added to
    the others', so that sums over all labels never fall. `always` are labels that do not count,
    those of the base models.
    """

    def __init__(
        self,
        families: Iterable[Family],
        most: int,
        always: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._always = frozenset(always)
        self._clock = clock
        self._used_s: OrderedDict[str, float] = OrderedDict()  # by adapter, longest idle first
        self._families: dict[str, tuple[Family, dict[str, Figures]]] = {
            family.name: (family, {}) for family in families
        }

    def count(self, name: str, adapter: str, number: float) -> None:
        figures = self._figures(name, adapter)
        figures.sum += number
        figures.text = None

    def observe(self, name: str, adapter: str, value: float) -> None:
        figures = self._figures(name, adapter)
        figures.counts[bisect_left(self._families[name][0].bounds, value)] += 1
        figures.sum += value
        figures.text = None

    def add(self, name: str, adapter: str, counts: Sequence[int], total: float) -> None:
        """Add many observations at once, already in buckets."""
        self._figures(name, adapter).add(counts, total)

    def parts(self) -> Iterator[str]:
        """The text, in pieces that are short to make. Figures may be added between two pieces."""
        for family, by_adapter in self._families.values():
            yield family.head()
            for adapter, figures in list(by_adapter.items()):
                if figures.text is None:
                    figures.text = family.lines(adapter, figures)
                yield figures.text

    def _figures(self, name: str, adapter: str) -> Figures:
        family, by_adapter = self._families[name]
        return _entry(family, by_adapter, self._label(adapter))

    def _label(self, adapter: str) -> str:
        if adapter in self._always:
            return adapter
        if adapter not in self._used_s and not self._has_room():
            return OTHER
        self._used_s[adapter] = self._clock()
        self._used_s.move_to_end(adapter)
        return adapter

    def _has_room(self) -> bool:
        """Whether one more may have a label, if need be that of one that is idle."""
        if len(self._used_s) < self._most:
            return True
        idle, used_s = next(iter(self._used_s.items()), (OTHER, self._clock()))
        if self._clock() - used_s < IDLE_S:
            return False
        del self._used_s[idle]
        for family, by_adapter in self._families.values():
            figures = by_adapter.pop(idle, None)
            if figures is not None:
                _entry(family, by_adapter, OTHER).add(figures.counts, figures.sum)
        return True


def _entry(family: Family, by_adapter: dict[str, Figures], label: str) -> Figures:
    figures = by_adapter.get(label)
    if figures is None:
        figures = by_adapter[label] = Figures(family)
    return figures


_ESCAPES: Mapping[int, str] = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def _escape(label: str) -> str:
    return label.translate(_ESCAPES)
