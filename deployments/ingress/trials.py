"""Trials: count what the requests of two versions show, and act on what follows (`policy.canary`).

Each ingress replica counts its own requests. Every few seconds it writes its sums into the store
and reads those of the others, so what it judges by is at most two periods old. Whoever concludes
first moves the alias: the store takes that only from the alias' present record, so it is done once.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from adapter_store.aliases import AliasView, Trial
from adapter_store.errors import AdapterStoreError
from adapter_store.verdict import Verdict
from deployments.fleet.background_tasks import BackgroundTasks
from deployments.ingress.flips import AUTHOR, AliasWriter
from deployments.ingress.trial_figures import (
    Tallies,
    decode_counts,
    encode_counts,
    judged,
    merged,
)
from deployments.policy.canary import Answered, Judgement, Tally

PERIOD_S = 5.0
MAX_TRIALS = 1000  # at a time, at one ingress replica

logger = logging.getLogger(__name__)


class TrialStore(AliasWriter, Protocol):
    """The part of `adapter_store.store.AdapterStore` that is used here."""

    def alias_view(self, tenant: str, full_name: str) -> AliasView | None: ...
    def refresh(self) -> None: ...
    def put_trial_counts(self, began: int, writer: str, counts: bytes) -> None: ...
    def verdict_of(self, ref_or_digest: str) -> Verdict | None: ...
    def trial_counts(self, began: int, but: str = "") -> Sequence[bytes]: ...
    def remove_trial_counts(self, began: int) -> None: ...


@dataclass(slots=True)
class _Running:
    """One trial, as this ingress replica sees it."""

    view: AliasView
    mine: Tallies = field(default_factory=dict[int, Tally])
    is_changed: bool = False  # what is mine, since it was written


class Trials:
    """Used in one event loop. `writer` names this ingress replica among all."""

    def __init__(self, store: TrialStore, writer: str, period_s: float = PERIOD_S) -> None:
        self._store, self._writer, self._period_s = store, writer, period_s
        self._running: dict[int, _Running] = {}  # by the record that they began with
        self._tasks = BackgroundTasks()
        self._is_started = False

    async def close(self) -> None:
        await self._tasks.close()

    def add(self, view: AliasView, version: int, seen: Answered) -> None:
        """Count a request of a version, if it is part of a trial."""
        tally = self._tally(view, version)
        if tally is not None and view.trial is not None:
            tally.add(seen, view.trial.ttft_s)

    def rate(self, view: AliasView, version: int, quality: float) -> None:
        """Count feedback, from 0 (bad) to 1 (good)."""
        tally = self._tally(view, version)
        if tally is not None:
            tally.see("disliked", 1 - quality)

    def _tally(self, view: AliasView, version: int) -> Tally | None:
        if not is_on(view):
            return None
        running = self._running.get(view.began)
        if running is None:
            if len(self._running) >= MAX_TRIALS:
                return None
            running = self._running[view.began] = _Running(view)
            self._start()
        if view.record > running.view.record:
            running.view = view
        running.is_changed = True
        return running.mine.setdefault(version, Tally())

    def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            self._tasks.start(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            for began in list(self._running):
                try:
                    await self.look(began)
                except (AdapterStoreError, OSError) as error:
                    view = self._running[began].view
                    logger.warning("the trial of %s cannot be judged: %s", view.text, error)
                except Exception:
                    logger.exception("the trial of %s", self._running[began].view.text)

    async def look(self, began: int) -> None:
        """Write and read the counts of a trial, and act on what follows.

        Raises AdapterStoreError, OSError.
        """
        running = self._running[began]
        raw = encode_counts(running.mine)
        is_changed, running.is_changed = running.is_changed, False
        try:
            is_over = await asyncio.to_thread(self._look, running.view, raw, is_changed)
        except BaseException:
            running.is_changed |= is_changed
            raise
        if is_over:
            self._running.pop(began, None)

    # ---- in a thread ---------------------------------------------------------------------

    def _look(self, seen: AliasView, mine: bytes, is_changed: bool) -> bool:
        """Return whether the trial is over."""
        began = seen.began
        self._store.refresh()
        view = self._store.alias_view(seen.tenant, f"{seen.name}@{seen.alias}")
        if view is None or not is_on(view) or view.trial is None or view.began != began:
            self._store.remove_trial_counts(began)
            return True
        if is_changed:
            self._store.put_trial_counts(began, self._writer, mine)
        counts = [mine, *self._store.trial_counts(began, self._writer)]
        tallies = merged([decode_counts(each) for each in counts])
        judgement, figures = judged(view, view.trial, tallies)
        failure = self._failure_of(view, view.trial)
        if failure is not None:
            judgement = replace(judgement, outcome="roll back", why=failure)
        if judgement.outcome == "go on":
            return False
        self._conclude(view, view.trial, judgement, figures)
        self._store.remove_trial_counts(began)
        return True

    def _failure_of(self, view: AliasView, trial: Trial) -> str | None:
        """Say why the candidate failed its latest proof, wherever that was; None if it did not."""
        digests = [ref.digest for ref, _ in view.shares if ref.version == trial.candidate]
        verdict = self._store.verdict_of(digests[0])
        if verdict is None or verdict.outcome != "failed":
            return None
        return f"its proof failed: {verdict.reason}"

    def _conclude(
        self, view: AliasView, trial: Trial, judgement: Judgement, figures: Mapping[str, Any]
    ) -> None:
        because = {"outcome": judgement.outcome, "of": view.record, "why": judgement.why, **figures}
        is_mine = self._store.share(
            view.tenant,
            view.name,
            view.alias,
            _weights_after(view, trial, judgement),
            by=AUTHOR,
            expected=view.record,
            because=because,
        )
        if is_mine:
            logger.warning("%s: %s, %s", view.text, judgement.outcome, judgement.why)


def _weights_after(view: AliasView, trial: Trial, judgement: Judgement) -> dict[int, float]:
    weights = {ref.version: weight for ref, weight in view.shares}
    if judgement.outcome == "hold":
        return weights
    is_promoted = judgement.outcome == "promote"
    return {v: 1.0 for v in weights if (v == trial.candidate) == is_promoted}


def is_on(view: AliasView) -> bool:
    """Tell whether an alias has a trial, and both of its versions answer."""
    return view.trial is not None and len(view.shares) == 2
