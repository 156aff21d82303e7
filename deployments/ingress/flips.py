"""Flips: an alias that has moved means its new versions once these are resident.

A new version is loaded, by a request of one token, at each replica that has an earlier one in
memory: an engine answers only after it has proven that an adapter acts. Meanwhile the earlier ones
answer; after WAIT_S they do no longer, and the log says that it was late. A version that some
replica cannot load sets the alias back to what it was, and the log says why.

Each ingress replica waits by itself, for the replicas that it knows.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from adapter_store.aliases import AliasView, Trial
from adapter_store.errors import AdapterStoreError
from adapter_store.names import AdapterRef
from deployments.fleet.background_tasks import BackgroundTasks
from deployments.fleet.engine_link import EngineLink
from deployments.fleet.held_requests import ModelNotReady
from engine.messages import ErrorKind

WAIT_S = 30.0
RETRY_S = 0.5  # between two tries at one replica
OLD_S = 60.0  # an alias that moved longer ago is not waited for
GUARDED_S = (
    3600.0  # for so long a version that cannot be loaded sets an alias back, without a trial
)
MAX_KNOWN = 10_000  # aliases
AUTHOR = "an ingress"

Shares = Sequence[tuple[AdapterRef, float]]
logger = logging.getLogger(__name__)


class AliasWriter(Protocol):
    """The part of `adapter_store.store.AdapterStore` that is used here."""

    def share(
        self,
        tenant: str,
        name: str,
        alias: str,
        weights: Mapping[int, float],
        trial: Trial | None = None,
        by: str = "",
        expected: int | None = None,
        because: Mapping[str, Any] | None = None,
    ) -> bool: ...
    def note_flip(
        self, view: AliasView, outcome: str, details: Mapping[str, Any], by: str = ""
    ) -> bool: ...


@dataclass(slots=True)
class _Move:
    """The latest move of an alias that was seen here."""

    record: int
    is_open: bool
    is_set_back: bool = False


class Flips:
    """Used in one event loop. `wall_clock` is that of the store's records."""

    def __init__(
        self,
        writer: AliasWriter,
        wait_s: float = WAIT_S,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._writer = writer
        self._wait_s, self._clock, self._wall_clock = wait_s, clock, wall_clock
        self._moves: OrderedDict[tuple[str, str, str], _Move] = OrderedDict()
        self._tasks = BackgroundTasks()

    async def close(self) -> None:
        await self._tasks.close()

    def shares(self, view: AliasView, link: EngineLink) -> Shares:
        """Return what an alias means here now. Never waits."""
        move = self._move_of(view)
        if move is None:
            move = self._note(view)
            holders = self._holders(view, link)
            if holders:
                move.is_open = False
                self._tasks.start(self._flip(view, link, move, holders))
        if move.is_set_back:
            return _fallback(view) or view.shares
        return view.shares if move.is_open or not view.before else view.before

    def fail(self, view: AliasView, ref: AdapterRef, reason: str) -> None:
        """Set an alias back because one of its new versions is of no use at some replica.

        Not if it has moved since: what fails then is no part of what it means now.
        """
        move = self._move_of(view)
        if move is not None and move.record != view.record:
            return
        is_new = ref.version not in {each.version for each, _ in view.before}
        is_tried = view.trial is not None and view.trial.candidate == ref.version
        is_recent = self._wall_clock() - view.moved_s < GUARDED_S
        if move is not None and not move.is_set_back and (is_tried or (is_new and is_recent)):
            move.is_set_back = True
            self._tasks.start(self._set_back(view, ref, reason))

    # ---- inside --------------------------------------------------------------------------

    def _move_of(self, view: AliasView) -> _Move | None:
        """Return the move with this record, or a later one that is known already."""
        found = self._moves.get((view.tenant, view.name, view.alias))
        return None if found is None or found.record < view.record else found

    def _note(self, view: AliasView) -> _Move:
        key = (view.tenant, view.name, view.alias)
        move = self._moves[key] = _Move(view.record, is_open=True)
        self._moves.move_to_end(key)
        if len(self._moves) > MAX_KNOWN:
            self._moves.popitem(last=False)
        return move

    def _holders(self, view: AliasView, link: EngineLink) -> Sequence[str]:
        """List the replicas where new versions are to be loaded before they answer."""
        is_old = self._wall_clock() - view.moved_s > OLD_S
        if is_old or view.flip or not view.before or not _new_versions(view):
            return []
        return link.holders([ref.digest for ref, _ in view.before])

    async def _flip(
        self, view: AliasView, link: EngineLink, move: _Move, holders: Sequence[str]
    ) -> None:
        began_s = self._clock()
        outcome = "late"
        try:
            async with asyncio.timeout(self._wait_s):
                for ref in _new_versions(view):
                    found = await asyncio.gather(*(self._load(link, ref, each) for each in holders))
                    reason = next((each for each in found if each is not None), None)
                    if reason is not None:
                        self.fail(view, ref, reason)
                        return
            outcome = "resident"
        except TimeoutError:
            pass
        finally:
            move.is_open = True
        waited_s = round(self._clock() - began_s, 3)
        details = {"replicas": len(holders), "waited_s": waited_s}
        logger.info("%s flips: %s, %s", view.text, outcome, details)
        await self._write(
            view, lambda: self._writer.note_flip(view, outcome, details, AUTHOR), "noted"
        )

    async def _load(self, link: EngineLink, ref: AdapterRef, replica_id: str) -> str | None:
        """Have a replica load a version; return why it cannot be served there. May take for ever.

        What is no fault of the version is tried again.
        """
        while True:
            try:
                error = await link.warm(ref, replica_id)
            except ModelNotReady:
                error = None  # there is no replica left
            if error is None:
                return None
            if error.kind == ErrorKind.ADAPTER_INVALID:
                return error.message
            await asyncio.sleep(RETRY_S)

    async def _set_back(self, view: AliasView, ref: AdapterRef, reason: str) -> None:
        """Move the alias to what it was. Here it means that already, whatever the store takes."""
        weights = {each.version: weight for each, weight in _fallback(view)}
        if not weights:
            logger.warning("%s cannot be served by version %d: %s", view.text, ref.version, reason)
            return
        because = {"outcome": "roll back", "of": view.record, "version": ref.version}
        because["why"] = f"it cannot be loaded: {reason}"[:1000]
        logger.warning("%s is set back from version %d: %s", view.text, ref.version, reason)
        place = (view.tenant, view.name, view.alias)
        await self._write(
            view,
            lambda: self._writer.share(
                *place, weights, by=AUTHOR, expected=view.record, because=because
            ),
            "set back",
        )

    async def _write(self, view: AliasView, write: Callable[[], bool], what: str) -> None:
        try:
            await asyncio.to_thread(write)
        except (AdapterStoreError, OSError) as error:
            logger.warning("%s could not be %s in the store: %s", view.text, what, error)


def _fallback(view: AliasView) -> Shares:
    """Return what an alias means without its new version: none if nothing of it is live."""
    if view.trial is not None:
        candidate = view.trial.candidate
        return [share for share in view.shares if share[0].version != candidate]
    return [share for share in view.before if share[1]]


def _new_versions(view: AliasView) -> Sequence[AdapterRef]:
    before = {ref.digest for ref, _ in view.before}
    return [ref for ref, weight in view.shares if weight and ref.digest not in before]
