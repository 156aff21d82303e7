"""HeldRequests: requests that wait at an ingress while a model's first replica starts."""

import asyncio
import math
from collections.abc import Callable

SMOOTHING = 4  # starts over which their mean forgets
UNKNOWN_START_S = 10.0  # after which to retry, until a start has been measured


class ModelNotReady(Exception):
    """No replica of the model has been heard of for a while."""

    def __init__(
        self,
        message: str = "The model is not ready: it is being loaded or restarted. Retry soon.",
        retry_after_s: int = 2,
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class HeldRequests:
    """At most `most` requests, each for at most `hold_s`."""

    def __init__(self, hold_s: float, most: int, clock: Callable[[], float]) -> None:
        self._hold_s, self._most, self._clock = hold_s, most, clock
        self._has_replica = asyncio.Event()
        self._since_s: float | None = None  # a replica is wanted, and there is none
        self._start_s = 0.0  # what starts have taken lately
        self.num = 0
        self.num_starts = 0
        self.total_start_s = 0.0

    @property
    def is_waking(self) -> bool:
        """Tell whether a replica has been wanted since the last one was lost."""
        return self._since_s is not None

    @property
    def is_late(self) -> bool:
        return self._since_s is not None and self._clock() - self._since_s > self._hold_s

    def note_replica(self) -> None:
        """Let all go on: there is a replica."""
        self._has_replica.set()
        if self._since_s is not None:
            took_s, self._since_s = self._clock() - self._since_s, None
            self.num_starts += 1
            self.total_start_s += took_s
            mean_s = self._start_s
            self._start_s = mean_s + (took_s - mean_s) / SMOOTHING if mean_s else took_s

    async def wait(self) -> float:
        """Wait for a replica, of which there is none; return for how long. Raises ModelNotReady."""
        began_s = self._clock()
        if self._since_s is None:
            self._since_s = began_s
        if self.num >= self._most:
            message = f"The model is being started, and {self.num} requests wait for it already."
            raise ModelNotReady(message, self._retry_after_s())
        self._has_replica.clear()
        self.num += 1
        try:
            async with asyncio.timeout(self._hold_s):
                await self._has_replica.wait()
        except TimeoutError:
            message = f"The model is being started, which takes longer than {self._hold_s:g} s."
            raise ModelNotReady(message, self._retry_after_s()) from None
        finally:
            self.num -= 1
        return self._clock() - began_s

    def _retry_after_s(self) -> int:
        """Return when the replica should be there."""
        assert self._since_s is not None
        left_s = (self._start_s or UNKNOWN_START_S) - (self._clock() - self._since_s)
        return max(math.ceil(left_s), 1)
