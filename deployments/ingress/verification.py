"""Verify stored adapters for a client that is shown how far it is: a line of JSON at a time."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence

from adapter_store.errors import AdapterStoreError
from adapter_store.names import AdapterRecord
from adapter_store.store import AdapterStore
from deployments.ingress.api.admin import VerifyLine

REPORT_S = 1.0  # between two lines


class _Stopped(Exception):
    """The client has gone."""


class Verification:
    """Hashes these adapters in a thread of its own, each content once."""

    def __init__(self, store: AdapterStore, records: Sequence[AdapterRecord]) -> None:
        self._store = store
        self._records = list({record.digest: record for record in records}.values())
        self._total = sum(record.nbytes for record in self._records)
        self._num_bytes = 0
        self._stop = threading.Event()

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield lines until all is hashed; a client that goes ends the work."""
        work = asyncio.ensure_future(asyncio.to_thread(self._run))
        try:
            while not (await asyncio.wait([work], timeout=REPORT_S))[0]:
                yield self._line(VerifyLine(checked_bytes=self._num_bytes, total_bytes=self._total))
            yield self._line(work.result())
        finally:
            self._stop.set()

    def _line(self, line: VerifyLine) -> bytes:
        return line.model_dump_json(exclude_none=True).encode() + b"\n"

    def _run(self) -> VerifyLine:
        damage: list[str] = []
        try:
            for record in self._records:
                damage += self._store.verify([record], self._on_bytes)
        except (AdapterStoreError, _Stopped) as error:
            damage.append(str(error))
            outcome = "failed"
        else:
            outcome = "damaged" if damage else "verified"
        return VerifyLine(
            checked_bytes=self._num_bytes,
            total_bytes=self._total,
            outcome=outcome,
            num_adapters=len(self._records),
            damage=damage,
        )

    def _on_bytes(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._stop.is_set():
            raise _Stopped("the client has gone")
        time.sleep(0)  # let other threads have the lock
