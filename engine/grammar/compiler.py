"""GrammarCompiler: compiles grammars one after the other, in a thread of the engine's process.

It keeps one process of grammars running. Tenants take turns, so that a tenant with a thousand
grammars holds up its own requests alone.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from engine.grammar.channel import ChannelLost
from engine.grammar.limits import MAX_FAILED_STARTS, RESTART_BACKOFF_S
from engine.grammar.link import GrammarLink, NoTable
from engine.grammar.messages import Verdict

log = logging.getLogger(__name__)


class Compiled(NamedTuple):
    """`link` is to the process that keeps the grammar; None if there is an error."""

    grammar_id: int
    verdict: Verdict
    link: GrammarLink | None = None


@dataclass(slots=True)
class _Job:
    grammar_id: int
    grammar: str
    is_second_try: bool = False


class GrammarCompiler:
    """`wake` is called in the thread whenever there is something to `poll`."""

    def __init__(self, start: Callable[[], GrammarLink], wake: Callable[[], None]) -> None:
        self._start = start
        self._wake = wake
        self._changed = threading.Condition()
        self._queues: dict[str, deque[_Job]] = {}  # by tenant, in the order of their turns
        self._dropped: list[int] = []
        self._refusal: Verdict | None = None  # of everything, once no process can be started
        self._done: deque[Compiled] = deque()
        self._is_closed = False
        self._num_failed = 0  # processes, since one has compiled something
        self._link: GrammarLink | None = None
        self._lost: GrammarLink | None = None
        self._thread = threading.Thread(target=self._run, name="grammar-compiler", daemon=True)
        self._thread.start()

    # ==== for the step loop ====

    def submit(self, tenant: str, grammar_id: int, grammar: str) -> None:
        with self._changed:
            if self._refusal is not None:
                self._done.append(Compiled(grammar_id, self._refusal))
                return
            self._queues.setdefault(tenant, deque()).append(_Job(grammar_id, grammar))
            self._changed.notify()

    def cancel(self, tenant: str, grammar_id: int) -> bool:
        """Take a grammar out of the queue; False if it is being compiled or is done."""
        with self._changed:
            queue = self._queues.get(tenant, ())
            job = next((job for job in queue if job.grammar_id == grammar_id), None)
            if job is None:
                return False
            self._queues[tenant].remove(job)
            return True

    def drop(self, grammar_id: int) -> None:
        """Forget a grammar that was compiled."""
        with self._changed:
            self._dropped.append(grammar_id)
            self._changed.notify()

    def lose(self, link: GrammarLink) -> None:
        """Have another process started, because this one does not answer."""
        with self._changed:
            self._lost = link
            self._changed.notify()

    @property
    def has_news(self) -> bool:
        return bool(self._done)

    def poll(self) -> list[Compiled]:
        """Return what has been compiled since the last call."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            link = self._link
            self._changed.notify()
        if link is not None:
            link.interrupt()  # ends a call that is under way
        self._thread.join()

    # ==== the thread ====

    def _run(self) -> None:
        while True:
            try:
                with self._changed:  # `close` sees every process that is started
                    if self._is_closed:
                        return None
                    link = self._link = self._start()
                try:
                    link.wait_for_table()
                    self._work(link)
                finally:
                    link.kill()
            except NoTable as error:
                return self._refuse_all(Verdict(f"the model's tokenizer is not supported: {error}"))
            except (ChannelLost, OSError) as error:
                self._num_failed += 1
                if self._is_closed:
                    return None
                log.error("the process of the grammars is started again: %s", error)
                if self._num_failed == MAX_FAILED_STARTS:
                    refusal = "its process cannot be started"
                    return self._refuse_all(Verdict(refusal, is_lasting=False))
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed, RESTART_BACKOFF_S)

    def _work(self, link: GrammarLink) -> None:
        """Compile until closed. Raises ChannelLost."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_work(link))
                if self._is_closed:
                    return
                if self._lost is link:
                    raise ChannelLost("it does not answer")
                dropped, self._dropped = self._dropped, []
                tenant, job = self._next_job()
            for grammar_id in dropped:
                link.drop(grammar_id)
            if job is not None:
                self._compile(link, tenant, job)

    def _has_work(self, link: GrammarLink) -> bool:
        is_queued = any(self._queues.values())
        return self._is_closed or self._lost is link or bool(self._dropped) or is_queued

    def _next_job(self) -> tuple[str, _Job | None]:
        """Take the next job of the tenant whose turn it is, who is the last one then."""
        for tenant in list(self._queues):
            queue = self._queues.pop(tenant)
            if queue:
                job = queue.popleft()
                if queue:
                    self._queues[tenant] = queue
                return tenant, job
        return "", None

    def _compile(self, link: GrammarLink, tenant: str, job: _Job) -> None:
        try:
            verdict = link.compile(job.grammar_id, job.grammar)
        except ChannelLost:
            if job.is_second_try:
                self._finish(Compiled(job.grammar_id, Verdict("the grammar cannot be compiled")))
            else:  # this grammar need not be the reason
                job.is_second_try = True
                with self._changed:
                    self._queues.setdefault(tenant, deque()).append(job)
            raise
        self._num_failed = 0
        self._finish(Compiled(job.grammar_id, verdict, None if verdict.error else link))

    def _finish(self, compiled: Compiled) -> None:
        self._done.append(compiled)
        self._wake()

    def _refuse_all(self, refusal: Verdict) -> None:
        log.error("grammars are refused: %s", refusal.error)
        with self._changed:
            self._refusal = refusal
            jobs = [job for queue in self._queues.values() for job in queue]
            self._queues.clear()
        for job in jobs:
            self._finish(Compiled(job.grammar_id, refusal))
