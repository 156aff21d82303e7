"""VerdictWriter: store what the engine has found out about adapters, and let nobody wait for it."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Protocol, cast

from adapter_store.errors import AccessDenied, AdapterStoreError
from adapter_store.verdict import Verdict
from engine.messages import AdapterVerdict

MAX_WAITING = 1000  # verdicts, while the store is slow

logger = logging.getLogger(__name__)


class Verdicts(Protocol):
    """The part of `adapter_store.store.AdapterStore` that this uses."""

    def note_verdict(self, digest: str, verdict: Verdict, /) -> bool: ...


class VerdictWriter:
    """Writes one after the other, in a thread of its own.

    A verdict that cannot be stored is logged: the engine acts on it all the same.
    """

    def __init__(self, store: Verdicts) -> None:
        self._store = store
        self._threads = ThreadPoolExecutor(1, "store-verdict")
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        self._is_denied = False

    def note(self, found: AdapterVerdict, engine: str) -> None:
        """Store a verdict soon; `engine` says what computed it."""
        if self._is_denied:
            return
        if not self._waiting.acquire(blocking=False):
            logger.warning("the verdict on %s is not stored: the store is slow", found.digest)
            return
        self._threads.submit(self._write, found.digest, make_verdict(found, engine))

    def _write(self, digest: str, verdict: Verdict) -> None:
        try:
            self._store.note_verdict(digest, verdict)
        except AccessDenied as error:
            self._is_denied = True
            logger.warning("verdicts on adapters are not stored: %s", error)
        except (AdapterStoreError, OSError) as error:
            logger.warning("the verdict on %s is not stored: %s", digest, error)
        finally:
            self._waiting.release()

    def close(self) -> None:
        """Write nothing more; a write that is under way is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def make_verdict(found: AdapterVerdict, engine: str) -> Verdict:
    """Write an engine's verdict as the store keeps it."""
    fields = asdict(found)
    del fields["digest"]
    return Verdict(engine=engine, **cast(Any, fields))
