"""Outbox: what a replica has for one ingress, and when it is sent.

A small model steps faster than anybody reads, and each event of a stream costs its ingress, HAProxy
and client more CPU than the step itself. So tokens may wait for those of the next steps: the more
streams there are, the longer, so that the events of all together are bounded in number. A model
whose steps take longer than that waits for nothing, nor does an answer's beginning or end.
"""

import asyncio
from collections.abc import Callable
from itertools import chain

from engine.messages import Item

PACE_S = 0.00025  # tokens wait for this long at most, for each other stream
MAX_PACE_S = 0.004  # and for this long however many there are


class Outbox:
    """Keeps the order of each request's items. Belongs to one event loop and one reader."""

    __slots__ = ("_clock", "_due_s", "_held", "_is_due", "_timer", "_urgent", "_wake")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._held: dict[str, list[Item]] = {}
        self._urgent: dict[str, None] = {}  # requests whose items do not wait
        self._due_s = 0.0  # of all the others
        self._is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._held)

    def put(self, request_id: str, item: Item) -> None:
        """Take an item. The tokens of one that waits and the same choice's next are joined."""
        held = self._held.get(request_id)
        is_tokens = isinstance(item, tuple)
        if held is None:
            self._held[request_id] = [item]
        elif is_tokens and isinstance(last := held[-1], tuple) and last[1] == item[1]:
            last[2].extend(item[2])
        else:
            held.append(item)
        if not is_tokens and (item.metrics is not None or item.finish_reason is not None):
            self._urgent[request_id] = None

    def end_step(self) -> None:
        """Wake the reader now, or as soon as something is due."""
        now_s = self._clock()
        if self._urgent or now_s >= self._due_s:
            self._wake.set()
        if self._timer is None and now_s < self._due_s:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._due_s - now_s, self._become_due)

    def wake(self) -> None:
        """Let the reader look whether it is to go on."""
        self._wake.set()

    async def wait(self) -> None:
        """Wait for something to take, or for `wake`."""
        await self._wake.wait()
        self._wake.clear()

    def take(self, num_streams: int) -> list[Item]:
        """Take what is due, perhaps nothing. So many streams share the ingress."""
        now_s = self._clock()
        if self._is_due or now_s >= self._due_s:
            self._due_s = now_s + min(PACE_S * (num_streams - 1), MAX_PACE_S)
            self._is_due = False
            self.close()
            taken, self._held = self._held, {}
        else:
            taken = {request_id: self._held.pop(request_id) for request_id in self._urgent}
        self._urgent.clear()
        return list(chain.from_iterable(taken.values()))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _become_due(self) -> None:
        self._timer = None
        self._is_due = True
        self._wake.set()
