"""The way from an ingress to the ledger: in this process, or one that all ingresses share.

What a request needs is asked for together with what others need at that moment. A ledger that
does not answer within ANSWER_S is not waited for again before it does.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from deployments.policy.bucket import Spent
from deployments.policy.leases import Leases
from deployments.policy.ledger import Answer, Ledger, Message

ANSWER_S = 1.0
TIDY_S = 0.5  # between two messages that renew places and give back what is not needed
HURRY_S = 0.02  # the same, where other ingresses may wait for a place
RETRY_S = 0.5
SPARE_ACCOUNTS = 64

Call = Callable[[Message], Awaitable[Answer]]

logger = logging.getLogger(__name__)


class LedgerLink(Protocol):
    leases: Leases

    async def ask(self) -> None:
        """Have the ledger grant what the leases want; return at once if it does not answer."""
        ...

    def hurry(self) -> None:
        """Give back soon what is not needed."""
        ...


class OwnLedger:
    """The ledger of the only ingress there is."""

    def __init__(
        self,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wall_s: Callable[[], float] = time.time,
        spent: Mapping[str, Spent] | None = None,
    ) -> None:
        self.leases = Leases("the only ingress")
        self.ledger = Ledger("own", clock_ns(), grace_ns=0, spent=spent)
        self._clock_ns, self._wall_s = clock_ns, wall_s
        self._sweep_at = SPARE_ACCOUNTS

    async def ask(self) -> None:
        is_sweep = self.leases.num_known > self._sweep_at
        self._exchange(is_tidying=is_sweep)
        if is_sweep:
            is_done = not self.leases.has_more_to_tidy
            self._sweep_at = (1 + is_done) * self.leases.num_known + SPARE_ACCOUNTS

    def hurry(self) -> None:
        """Nobody else waits."""

    def _exchange(self, is_tidying: bool) -> None:
        now_ns, wall_s = self._clock_ns(), self._wall_s()
        message = self.leases.message(now_ns, wall_s, is_tidying)
        if message is not None:
            self.leases.accept(self.ledger.take(message, now_ns, wall_s), now_ns)


class SharedLedger:
    """One ledger for `num_ingresses` ingresses, which `call` reaches."""

    def __init__(
        self,
        call: Call,
        ingress: str,
        num_ingresses: int,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.leases = Leases(ingress, num_ingresses)
        self._call = call
        self._clock_ns, self._wall_s = clock_ns, wall_s
        self._wanted = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._tidy_at_ns = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tell the ledger what is held, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def ask(self) -> None:
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._wanted.set()
        await done

    def hurry(self) -> None:
        soon_ns = self._clock_ns() + int(HURRY_S * 1e9)
        if soon_ns < self._tidy_at_ns:
            self._tidy_at_ns = soon_ns
            self._wanted.set()

    async def _run(self) -> None:
        while True:
            try:
                await self._exchange()
            except Exception as error:  # a fault of ours: nobody is to wait for ever because of it
                logger.exception("the exchange with the quota ledger failed")
                self._be_alone(error)
                self._let_go(self._waiting)
                await asyncio.sleep(RETRY_S)

    async def _exchange(self) -> None:
        await self._wait()
        now_ns = self._clock_ns()
        is_due = now_ns >= self._tidy_at_ns
        if not is_due and not self._waiting:
            return
        if is_due:
            self._tidy_at_ns = now_ns + int(TIDY_S * 1e9)
        waiting, self._waiting = self._waiting, []  # others ask with the next message
        try:
            message = self.leases.message(now_ns, self._wall_s(), is_due)
            if message is not None:
                await self._deliver(message, waiting)
        finally:
            self._let_go(waiting)
        await asyncio.sleep(0)  # they take what was granted, before it could be given back
        if is_due and self.leases.has_more_to_tidy:
            self.hurry()

    async def _wait(self) -> None:
        rest_s = max(0.0, (self._tidy_at_ns - self._clock_ns()) / 1e9)
        try:
            async with asyncio.timeout(rest_s):
                await self._wanted.wait()
        except TimeoutError:
            pass
        self._wanted.clear()

    async def _deliver(self, message: Message, waiting: list[asyncio.Future[None]]) -> None:
        """Send a message until it is answered; nobody waits for more than the first try."""
        while True:
            try:
                async with asyncio.timeout(ANSWER_S):
                    answer = await self._call(message)
            except Exception as error:  # whatever it is: the ledger does not answer
                self._be_alone(error)
                self._let_go(waiting)
                self._let_go(self._waiting)
            else:
                was_alone = self.leases.is_alone
                if self.leases.accept(answer, self._clock_ns()):
                    if was_alone and not self.leases.is_alone:
                        logger.info("the quota ledger answers")
                    return
            await asyncio.sleep(RETRY_S)

    def _be_alone(self, error: Exception) -> None:
        if not self.leases.is_alone:
            logger.warning(
                "the quota ledger does not answer (%r): this ingress goes on with its share of "
                "every limit",
                error,
            )
        self.leases.set_alone(True)

    def _let_go(self, waiting: list[asyncio.Future[None]]) -> None:
        for done in waiting:
            if not done.done():
                done.set_result(None)
        waiting.clear()
