"""Traffic split: which of several versions answers a session, by weight.

Weighted rendezvous hashing: each version draws an exponential waiting time for the session, divided
by its weight, and the shortest one wins. So a version answers its part of the sessions, and the
same session finds the same version. When weights change a session moves from one version to another
only if the other's weight has risen relative to the first one's: a rising share only gains
sessions, however many versions there are, and one that goes away leaves all others where they are.
(Weighted rendezvous hashing: Schindelhauer and Schomaker, SPAA 2005.)
"""

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
_SPAN = 2**64


def choose(shares: Sequence[tuple[T, str, float]], session: str) -> T:
    """Return which of the (version, its name, its weight) answers this session.

    Weights are at least 0, and not all of them 0. Of the same shares any process chooses alike.
    """
    best, shortest = shares[0][0], math.inf
    for version, name, weight in shares:
        waits = _exponential(name, session) / weight if weight > 0 else math.inf
        if waits < shortest:
            best, shortest = version, waits
    return best


def _exponential(name: str, session: str) -> float:
    """Draw from the exponential distribution, always the same for the same two texts."""
    seen = hashlib.blake2b(session.encode(errors="replace"), digest_size=8, key=_key(name))
    uniform = (int.from_bytes(seen.digest(), "big") + 0.5) / _SPAN
    return -math.log(uniform)


def _key(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="replace"), digest_size=32).digest()
