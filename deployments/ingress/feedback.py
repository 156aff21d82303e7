"""Feedback: scores that clients give to answers, counted for the version that gave them.

Which version it was is remembered for MAX_AGE_S and for MAX_ANSWERS answers, at the ingress replica
that answered; the others are asked where an id is not known here. Each answer is scored once.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from deployments.ingress.metrics import Metrics

MAX_AGE_S = 3600.0
MAX_ANSWERS = 20_000
MAX_COMMENT = 1000  # characters

logger = logging.getLogger(__name__)


class Rated(Protocol):
    """Where the score of an answer is counted besides the metrics."""

    def rated(self, quality: float) -> None: ...


@dataclass(slots=True)
class _Known:
    label: str
    arm: Rated | None
    answered_s: float
    is_rated: bool = False


Elsewhere = Callable[[str, str, float, str], Awaitable[bool | None]]


async def _nowhere(tenant: str, answer_id: str, score: float, comment: str) -> None:
    return None


class Feedback:
    """Used in one event loop.

    `elsewhere` asks the other ingress replicas to take a score, as `take` does.
    """

    def __init__(
        self,
        metrics: Metrics,
        elsewhere: Elsewhere = _nowhere,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics, self._elsewhere, self._clock = metrics, elsewhere, clock
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()

    def remember(
        self, tenant: str, ids: Iterable[str], label: str, arm: Rated | None = None
    ) -> None:
        """Remember which version answers a request, by each of its ids."""
        known = _Known(label, arm, self._clock())
        for each in ids:
            self._known[tenant, each] = known
            self._known.move_to_end((tenant, each))
        while len(self._known) > 2 * MAX_ANSWERS:
            self._known.popitem(last=False)

    async def rate(self, tenant: str, answer_id: str, score: float, comment: str) -> bool | None:
        """Count a score, here or elsewhere. See `take`."""
        taken = self.take(tenant, answer_id, score, comment)
        if taken is None:
            return await self._elsewhere(tenant, answer_id, score, comment)
        return taken

    def take(self, tenant: str, answer_id: str, score: float, comment: str) -> bool | None:
        """Count a score in [-1, 1], of which all up to 0 are bad, unless there is one already.

        Returns whether it counts; None for an answer that this tenant has not got here lately.
        """
        known = self._known.get((tenant, answer_id))
        if known is None or self._clock() - known.answered_s > MAX_AGE_S:
            return None
        if known.is_rated:
            return False
        known.is_rated = True
        quality = max(score, 0.0)
        self._metrics.count_feedback(known.label, quality)
        if known.arm is not None:
            known.arm.rated(quality)
        if comment:
            logger.info("feedback on %s of %s: %g, %r", answer_id, known.label, score, comment)
        return True
