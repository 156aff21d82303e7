"""AdapterLabels: bound the number of label values that adapters may have in metrics."""

from collections.abc import Iterable

OTHER = "other"


class AdapterLabels:
    """The first `most` adapters with traffic keep labels of their own, all later ones share one.

    A label never changes afterwards: counters of its series must not fall. `always` are labels
    that do not count, those of the base models.
    """

    def __init__(self, most: int, always: Iterable[str] = ()) -> None:
        self._most = most
        self._always = frozenset(always)
        self._own: set[str] = set()

    def of(self, name: str) -> str:
        if name in self._own or name in self._always:
            return name
        if len(self._own) >= self._most:
            return OTHER
        self._own.add(name)
        return name
