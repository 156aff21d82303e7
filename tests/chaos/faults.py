"""The faults of a storm: each is begun, lasts, and ends when all has recovered."""

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from tests.adapter_store.forwarder import Fault, Forwarder
from tests.chaos.case import JSON, Case, complete
from tests.chaos.exchange import exchange, problem
from tests.chaos.server import Server
from tests.chaos.store_faults import cutting, failing, hanging, refusing, slow
from tests.chaos.world import MODEL
from tests.deployments.support.processes import command

RECOVERY_S = 120.0
BLOCK = b"\0" * 2**16
BRIEFLY_S = 2.0  # less than an engine may be silent
STORE_S = 10.0
HOSTILE_S = 10.0
NUM_HOSTILE = 3  # at a time
NUM_ENGINES = NUM_INGRESSES = 2
CHOICE = {"model": MODEL, "prompt": "x", "structured_outputs": {"choice": ["yes"]}}
CHOOSING = complete(Case(0, "POST", b"/v1/completions", (JSON,), json.dumps(CHOICE).encode()), [])


@dataclass
class Target:
    """What faults are done to, and what they find out."""

    server: Server
    forwarder: Forwarder
    hostile: Sequence[Case]
    rng: Random
    num_blocks: float = 0.0  # KV blocks of all engines, as an ingress sees them
    hostile_statuses: Counter[int] = field(default_factory=Counter[int])
    problems: list[str] = field(default_factory=list[str])

    def one_of(self, group: str) -> int:
        return self.rng.choice(self.server.look()[group])

    # ---- processes -----------------------------------------------------------------------

    async def kill(self, group: str) -> None:
        pid = self.one_of(group)
        os.kill(pid, signal.SIGKILL)
        while command(pid):  # its memory is freed first, which takes a moment
            await asyncio.sleep(0.02)

    async def kill_grammars(self) -> None:
        """End one of an engine's processes for grammars, and wait until it has them again."""
        await self.kill("grammar")
        deadline_s = time.monotonic() + RECOVERY_S
        while not await self._all_choose():
            if time.monotonic() > deadline_s:
                self.problems.append("no structured output after its process was killed")
                return
            await asyncio.sleep(0.2)

    async def _all_choose(self) -> bool:
        """Whether engines, one of which was hit, hold some answers to a list of texts."""
        asked = [exchange(self.server.port, CHOOSING) for _ in range(4 * NUM_ENGINES)]
        answers = await asyncio.gather(*asked)
        return all(answer.status == 200 and b'"yes"' in answer.body for answer in answers)

    async def stop_briefly(self) -> None:
        pid = self.one_of("engine")
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(BRIEFLY_S)
        os.kill(pid, signal.SIGCONT)

    async def stop_for_good(self) -> None:
        """Until it is killed for its silence."""
        pid = self.one_of("engine")
        os.kill(pid, signal.SIGSTOP)
        deadline_s = time.monotonic() + RECOVERY_S
        while pid in self.server.look().get("engine", []):
            if time.monotonic() > deadline_s:
                self.problems.append(f"engine {pid} was stopped, and is not replaced")
                os.kill(pid, signal.SIGCONT)
                return
            await asyncio.sleep(0.2)

    async def until_recovered(self) -> None:
        deadline_s = time.monotonic() + RECOVERY_S
        while not (self._is_complete() and await asyncio.to_thread(self._is_healthy)):
            if time.monotonic() > deadline_s:
                self.problems.append(f"not recovered in {RECOVERY_S} s: {self.server.look()}")
                return
            await asyncio.sleep(0.2)

    def _is_complete(self) -> bool:
        groups = self.server.look()
        numbers = {"engine": NUM_ENGINES, "replica": NUM_ENGINES, "ingress": NUM_INGRESSES}
        return all(len(groups.get(group, [])) == number for group, number in numbers.items())

    def note_blocks(self) -> None:
        """Remember what there is while all engines are ready."""
        known = [scrape["reef_kv_blocks_total"] for scrape in self.server.scrapes()]
        self.num_blocks = max(known)

    def _is_healthy(self) -> bool:
        """Whether each ingress knows the KV blocks of all engines; adapters in use take some."""
        with suppress(OSError):
            urllib.request.urlopen(f"{self.server.url}/health", timeout=5).close()
            scrapes = self.server.scrapes()
            known = [scrape["reef_kv_blocks_total"] for scrape in scrapes]
            return len(scrapes) == NUM_INGRESSES and min(known) > 0.75 * self.num_blocks
        return False

    # ---- the store and the disk ------------------------------------------------------------

    async def fail_store(self, fault: Fault) -> None:
        with failing(self.forwarder, fault):
            await asyncio.sleep(STORE_S)

    async def hang_store(self) -> None:
        with hanging(self.forwarder):
            await asyncio.sleep(STORE_S)

    async def fill_disk(self) -> None:
        """Write until the file system of the disk cache is full, and again whenever it is not."""
        filler = self.server.disk / "filler"
        ends_s = time.monotonic() + STORE_S
        try:
            while time.monotonic() < ends_s:
                with suppress(OSError), filler.open("ab", buffering=0) as file:
                    while True:
                        file.write(BLOCK)
                with suppress(OSError), filler.open("ab", buffering=0) as file:
                    while True:
                        file.write(b"\0" * 512)
                await asyncio.sleep(0.05)
        finally:
            filler.unlink(missing_ok=True)

    # ---- clients -----------------------------------------------------------------------------

    async def send_hostile(self) -> None:
        ends_s = time.monotonic() + HOSTILE_S

        async def sender() -> None:
            while time.monotonic() < ends_s:
                case = self.rng.choice(self.hostile)
                answer = await exchange(self.server.port, case)
                self.hostile_statuses[answer.status] += 1
                found = problem(case, answer)
                if found is not None:
                    what = f"hostile body {case.number} ({case.changes[0]})"
                    self.problems.append(f"{what}: {found}: {answer.body[:200]!r}")

        await asyncio.gather(*(sender() for _ in range(NUM_HOSTILE)))


Action = Callable[[Target], Awaitable[None]]
FAULTS: dict[str, Action] = {
    "engine is killed": lambda target: target.kill("engine"),
    "grammars are killed": lambda target: target.kill_grammars(),
    "engine is stopped 2 s": lambda target: target.stop_briefly(),
    "engine is stopped": lambda target: target.stop_for_good(),
    "replica is killed": lambda target: target.kill("replica"),
    "ingress is killed": lambda target: target.kill("ingress"),
    "store is slow": lambda target: target.fail_store(slow),
    "store answers 500": lambda target: target.fail_store(refusing(500, "InternalError")),
    "store answers 503": lambda target: target.fail_store(refusing(503, "SlowDown")),
    "store hangs": lambda target: target.hang_store(),
    "store breaks off": lambda target: target.fail_store(cutting),
    "disk is full": lambda target: target.fill_disk(),
    "hostile bodies": lambda target: target.send_hostile(),
}
