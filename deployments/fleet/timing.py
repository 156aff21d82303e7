"""Timing: the periods and timeouts of an ingress, and the clock that they are measured by."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """All in seconds."""

    renew_s: float = 2.0  # between two renewals of a lease; well below the replica's LEASE_S
    silence_s: float = 10.0  # a replica that does not answer for this long is given up
    lost_s: float = 5.0  # a request that its replica has not known for this long is lost
    retry_s: float = 0.05  # before the second attempt to place a request; doubled every time
    max_retry_s: float = 1.0
    patience_s: float = 30.0  # to find a replica that takes a request
    hold_s: float = 120.0  # for a replica of a model that has none to start
    # A request that lost its replica waits longer: so many times patience_s, or so many loads of
    # the model if that is more.
    lost_patience: float = 2.0
    lost_loads: float = 3.0
    suspect_s: float = 30.0  # a replica that was lost is the last choice for this long
    hello_s: float = 10.0  # without a stream for this long, the model counts as not ready
    clock: Callable[[], float] = time.monotonic
