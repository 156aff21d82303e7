"""BatchQueue: an unbounded queue whose one reader takes everything that has come, in order."""

import asyncio
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class BatchQueue(Generic[ItemT]):
    """Never full, so that an engine never waits for a slow client."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[ItemT] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: ItemT) -> None:
        self._items.append(item)
        self.wake()

    def wake(self) -> None:
        """Let a reader that waits go on, perhaps without an item."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def next_batch(self) -> list[ItemT]:
        """Wait for at least one item or for `wake`, and take all there are."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items
