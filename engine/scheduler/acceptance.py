"""Acceptance: how often a request's drafted tokens turn out to be right, by how they were found.

A token that follows a long match is right far more often than one that follows a short one, and
each right token makes the match longer by one. So chances are kept by the length of the match.
"""

from itertools import accumulate
from operator import mul

# Matches of so many tokens have one chance; before anything is known it is the one beside them.
CLASSES = ((0, 0.25), (3, 0.45), (4, 0.6), (6, 0.75), (9, 0.85), (17, 0.9))
LONGEST = 17
PRIOR_WEIGHT = 2.0  # tokens drafted that the chances above count for
MEMORY = 0.95  # weight of earlier drafts beside a new one
FADING = 0.997  # of them, with each draft that was not tried: what loses is tried again at times


def _class_of(length: int) -> int:
    return max(at for at, (least, _) in enumerate(CLASSES) if least <= length)


_CLASS_OF = tuple(_class_of(length) for length in range(LONGEST + 1))


class Acceptance:
    """What one request's drafts have shown."""

    def __init__(self) -> None:
        self._tried = [0.0] * len(CLASSES)
        self._right = [0.0] * len(CLASSES)
        self._chances = [chance for _, chance in CLASSES]

    def chance(self, match: int) -> float:
        """Return the chance of the first token behind a match of this length."""
        return self._chances[_CLASS_OF[min(match, LONGEST)]]

    def chances(self, match: int, count: int) -> list[float]:
        """List, for each of `count` drafted tokens behind a match of this length, the chance that
        it and all before it are right."""
        classes = (_CLASS_OF[min(match + i, LONGEST)] for i in range(count))
        return list(accumulate((self._chances[c] for c in classes), mul))

    def record(self, match: int, num_drafted: int, num_accepted: int) -> None:
        for i in range(min(num_accepted + 1, num_drafted)):
            at = _CLASS_OF[min(match + i, LONGEST)]
            self._fade(at, MEMORY)
            self._tried[at] += 1
            self._right[at] += i < num_accepted
            self._estimate(at)

    def decline(self, match: int) -> None:
        """Note a draft that was not tried, as its chance was too small."""
        at = _CLASS_OF[min(match, LONGEST)]
        self._fade(at, FADING)
        self._estimate(at)

    def _fade(self, at: int, factor: float) -> None:
        self._tried[at] *= factor
        self._right[at] *= factor

    def _estimate(self, at: int) -> None:
        prior = PRIOR_WEIGHT * CLASSES[at][1]
        self._chances[at] = (self._right[at] + prior) / (self._tried[at] + PRIOR_WEIGHT)
