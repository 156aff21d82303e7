"""Acceptance: how often drafted tokens turn out to be right, by how they were found.

A token that follows a long match is right far more often than one that follows a short one, and
each right token makes the match longer by one. So chances are kept by the length of the match.

What an adapter writes copies, or does not, in most of its requests. So each request begins with
what those before it with the same adapter have shown, and goes on with what it shows itself.
"""

from collections import OrderedDict
from itertools import accumulate
from operator import mul
from typing import NamedTuple

# Matches of so many tokens have one chance; before anything is known it is the one beside them.
CLASSES = ((0, 0.25), (3, 0.45), (4, 0.6), (6, 0.75), (9, 0.85), (17, 0.9))
LONGEST = 17
PRIOR_WEIGHT = 2.0  # tokens drafted that the chances above, or an adapter's, count for
MAX_ADAPTERS = 1024  # whose acceptance is kept, those used last


class Pace(NamedTuple):
    """How fast is forgotten."""

    memory: float  # weight of earlier drafts beside a new one
    fading: float  # of them, with each draft that is not tried: what loses is tried again at times


OF_REQUEST, OF_ADAPTER = Pace(0.95, 0.997), Pace(0.99, 0.9997)


def _class_of(length: int) -> int:
    return max(at for at, (least, _) in enumerate(CLASSES) if least <= length)


_CLASS_OF = tuple(_class_of(length) for length in range(LONGEST + 1))


class Acceptance:
    """What drafts of one request have shown, or of all requests with one adapter.

    `before` is what is believed of the request before any of its drafts was tried.
    """

    def __init__(self, before: "Acceptance | None" = None, pace: Pace = OF_REQUEST) -> None:
        self._before = before
        self._pace = pace
        self._tried = [0.0] * len(CLASSES)
        self._right = [0.0] * len(CLASSES)

    def chance(self, match: int) -> float:
        """Return the chance of the first token behind a match of this length."""
        return self._chance_of(_CLASS_OF[min(match, LONGEST)])

    def chances(self, match: int, count: int) -> list[float]:
        """List, for each of `count` drafted tokens behind a match of this length, the chance that
        it and all before it are right."""
        classes = [_CLASS_OF[min(match + i, LONGEST)] for i in range(count)]
        by_class = {at: self._chance_of(at) for at in set(classes)}
        return list(accumulate((by_class[at] for at in classes), mul))

    def record(self, match: int, num_drafted: int, num_accepted: int) -> None:
        for i in range(min(num_accepted + 1, num_drafted)):
            at = _CLASS_OF[min(match + i, LONGEST)]
            self._fade(at, self._pace.memory)
            self._tried[at] += 1
            self._right[at] += i < num_accepted
        if self._before is not None:
            self._before.record(match, num_drafted, num_accepted)

    def decline(self, match: int) -> None:
        """Note a draft that was not tried, as its chance was too small."""
        self._fade(_CLASS_OF[min(match, LONGEST)], self._pace.fading)
        if self._before is not None:
            self._before.decline(match)

    def _fade(self, at: int, factor: float) -> None:
        self._tried[at] *= factor
        self._right[at] *= factor

    def _chance_of(self, at: int) -> float:
        prior = CLASSES[at][1] if self._before is None else self._before._chance_of(at)
        return (self._right[at] + PRIOR_WEIGHT * prior) / (self._tried[at] + PRIOR_WEIGHT)


class AdapterAcceptance:
    """The acceptance of each adapter, by its digest; of the base, by an empty one."""

    def __init__(self) -> None:
        self._by_digest: OrderedDict[str, Acceptance] = OrderedDict()

    def begin(self, digest: str) -> Acceptance:
        """Return the acceptance of a new request."""
        known = self._by_digest.setdefault(digest, Acceptance(pace=OF_ADAPTER))
        self._by_digest.move_to_end(digest)
        if len(self._by_digest) > MAX_ADAPTERS:
            self._by_digest.popitem(last=False)
        return Acceptance(known)
