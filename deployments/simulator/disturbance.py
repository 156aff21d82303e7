"""Disturbance: what other programs, and the system, add to some of a machine's steps.

A profile says how large the part of disturbed steps is and what they take longer. Which steps these
are depends on the replica and the step's number alone, so the same simulation has the same ones,
however its steps are grouped.
"""

from random import Random
from zlib import crc32

import msgspec

from deployments.simulator.checked import Seconds, Share

_PERIOD = 4093  # steps after which the pattern repeats: a prime, as few rhythms of traffic are
_PATTERN = tuple((rank + 0.5) / _PERIOD for rank in Random(1).sample(range(_PERIOD), _PERIOD))


class Disturbed(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`share` of the steps take longer, each by one of `seconds`, all as likely."""

    share: Share = 0.0
    seconds: tuple[Seconds, ...] = ()

    def __post_init__(self) -> None:
        if self.share > 0 and not self.seconds:
            raise ValueError(f"seconds must have a number or more where share is {self.share}")


class Disturbance:
    """The delays of one replica's steps, by their numbers."""

    def __init__(self, disturbed: Disturbed, replica_id: str) -> None:
        self._share, self._seconds = disturbed.share, disturbed.seconds
        self._offset = crc32(replica_id.encode())

    @property
    def is_none(self) -> bool:
        return not self._share

    def of_step(self, number: int) -> float:
        """Return the seconds that this step takes longer."""
        drawn = _PATTERN[(self._offset + number) % _PERIOD]
        if drawn >= self._share:
            return 0.0
        return self._seconds[int(drawn / self._share * len(self._seconds))]
