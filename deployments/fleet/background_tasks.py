"""BackgroundTasks: tasks that may outlive the call that started them."""

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any


class BackgroundTasks:
    """Keeps a reference to every task until it ends, as asyncio does not."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        # In a context of its own: what runs in that of an HTTP request is cancelled with it.
        task = asyncio.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
