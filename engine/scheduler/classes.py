"""Priority classes: which of several tenants' requests are more urgent, and what the rest is owed.

Requests of a higher class go first: they begin first, and where seats or blocks lack, requests of
the lowest class that runs go back to the queue. No class waits for ever: while it waits beside a
higher one, a class is owed its part of what is computed for those above (`LEAST_SHARE`), in the
tokens that tenants are charged for. As long as that is more than `GRAIN`, one of its requests a
step goes before all others, and keeps its seat to its end. It is owed nothing of what was computed
while none of its requests waited. While nothing of a higher class waits or runs, what it is owed
stays as it is; while some run but none waits, what it gets pays for that, and is no advance.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple


class PriorityClass(IntEnum):
    """The lower, the more urgent."""

    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2

    __hash__ = int.__hash__  # an enum's own is in Python, and flows are looked up in every step


# Of what is computed for higher classes. They add up to little: what is urgent loses at most that.
LEAST_SHARE = {
    PriorityClass.INTERACTIVE: 0.0,
    PriorityClass.STANDARD: 1 / 8,
    PriorityClass.BATCH: 1 / 16,
}
GRAIN = 500.0  # tokens that a class is owed before it comes first: a short answer


class Flow(NamedTuple):
    """A tenant's requests of one class, which are served fairly beside others' of that class."""

    tenant: str
    priority_class: PriorityClass = PriorityClass.STANDARD


def first_rank(priority_class: PriorityClass) -> int:
    """Return the place, before all classes, of what a class is owed."""
    return priority_class - len(PriorityClass)


_CLASSES = tuple(PriorityClass)


class ClassShares:
    """What each class was given, and is owed by those above."""

    def __init__(self) -> None:
        self._given = [0.0] * len(PriorityClass)
        self._owed = [0.0] * len(PriorityClass)  # when it was noted last
        self._above = [0.0] * len(PriorityClass)  # given to higher ones until then
        self._own = [0.0] * len(PriorityClass)  # given to it until then
        self._num_running = [0] * len(PriorityClass)
        self._begun: set[PriorityClass] = set()  # for what they were owed, in this step

    def charge(self, priority_class: PriorityClass, tokens: float) -> None:
        self._given[priority_class] += tokens

    def owed(self, priority_class: PriorityClass) -> float:
        """Return the tokens that a class should have had; below 0 if it had more."""
        above = sum(self._given[:priority_class]) - self._above[priority_class]
        own = self._given[priority_class] - self._own[priority_class]
        return self._owed[priority_class] + LEAST_SHARE[priority_class] * above - own

    def rank(self, priority_class: PriorityClass) -> int:
        """Return the place of a class: below 0 where its next request goes before all others."""
        if not priority_class or priority_class in self._begun:
            return priority_class
        is_owed = self.owed(priority_class) > GRAIN
        return first_rank(priority_class) if is_owed else priority_class

    def begin(self, priority_class: PriorityClass) -> bool:
        """Note that a request of this class begins; return whether its class was owed it."""
        is_owed = self.rank(priority_class) < 0
        if is_owed:
            self._begun.add(priority_class)
        self._num_running[priority_class] += 1
        return is_owed

    def leave(self, priority_class: PriorityClass) -> None:
        """Note that a request of this class runs no more."""
        self._num_running[priority_class] -= 1

    def note_waiting(self, flows: Iterable[Flow]) -> None:
        """Note which flows wait in the next step: nothing is owed but to who waits beside a
        higher class."""
        self._begun.clear()
        waiting = {flow.priority_class for flow in flows}
        for each in _CLASSES[1:]:
            owed = self._owed_beside(each, waiting)
            self._owed[each] = owed if each in waiting else min(owed, 0.0)
            self._above[each] = sum(self._given[:each])
            self._own[each] = self._given[each]

    def _owed_beside(self, each: PriorityClass, waiting: set[PriorityClass]) -> float:
        """Return what a class is owed by now, by whether higher ones wait or run beside it."""
        before = self._owed[each]
        if waiting and min(waiting) < each:
            return self.owed(each)
        if any(self._num_running[:each]):
            return max(self.owed(each), min(before, 0.0))  # what nobody missed is no advance
        return max(before, 0.0)
