"""Mailbox: news in order, for one reader: of one HTTP request's generations, or of one wire."""

import asyncio
from typing import Generic, TypeVar

NewsT = TypeVar("NewsT")


class Mailbox(Generic[NewsT]):
    """Never full: an engine does not wait for a slow client."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[NewsT] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: NewsT) -> None:
        self._items.append(item)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def next(self) -> list[NewsT]:
        """Everything new, at least one item."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items
