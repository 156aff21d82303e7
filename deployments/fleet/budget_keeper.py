"""BudgetKeeper: what tenants have spent of budgets, in the object store for the next ledger.

Rates refill within minutes, so nothing is kept of them. Budgets are of a day and of a month: they
are written every SAVE_S in which they change. A server of which all processes end at once forgets
what was granted since then.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from adapter_store.errors import AdapterStoreError, ObjectNotFound
from adapter_store.object_store import ObjectStore
from deployments.policy.bucket import Spent
from deployments.policy.ledger import Ledger

SAVE_S = 5.0
KEY = "quota/spent.json"

logger = logging.getLogger(__name__)


class BudgetKeeper:
    """Used in the event loop of the ledger. Reads once, then writes. Errors are logged."""

    def __init__(
        self,
        store: ObjectStore,
        ledger: Ledger,
        may_write: bool = True,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._may_write = may_write
        self._wall_s = wall_s
        self._saved: Mapping[str, Spent] | None = None  # None: not read yet
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def look(self) -> None:
        """Read what the last ledger wrote, or write what has changed since."""
        if self._saved is None:
            self._saved = await asyncio.to_thread(self._load)
            self._ledger.learn(self._saved, self._wall_s())
        spent = self._ledger.all_spent(self._wall_s())
        if self._may_write and spent != self._saved:
            await asyncio.to_thread(self._store.put, KEY, write_spent(spent))
            self._saved = spent

    def _load(self) -> Mapping[str, Spent]:
        try:
            return read_spent(self._store.get(KEY))
        except ObjectNotFound:
            return {}
        except (ValueError, TypeError, KeyError) as error:
            logger.error("%s is damaged, budgets begin anew: %r", KEY, error)
            return {}

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except AdapterStoreError as error:
                logger.warning("what is spent of budgets could not be kept: %s", error)
            except Exception:
                logger.exception("what is spent of budgets could not be kept")
            await asyncio.sleep(SAVE_S)


def write_spent(spent: Mapping[str, Spent]) -> bytes:
    rows = {name: [each.day, each.today, each.this_month] for name, each in spent.items()}
    return json.dumps({"format": 1, "spent": rows}, sort_keys=True).encode()


def read_spent(raw: bytes) -> dict[str, Spent]:
    """Read what `write_spent` wrote. Raises ValueError, TypeError or KeyError for anything else."""
    document: Any = json.loads(raw)
    if document["format"] != 1:
        raise ValueError(f"format {document['format']!r} is not 1")
    return {name: Spent(*map(int, row)) for name, row in document["spent"].items()}
