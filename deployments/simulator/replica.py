"""SimulatedReplica: the engine's scheduler and memory, with steps that take only virtual time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from deployments.policy.autoscaling import ReplicaLoad
from deployments.policy.capacity import Capacity
from deployments.policy.load_meter import LoadMeter
from deployments.policy.replica_view import ReplicaFigures
from deployments.simulator.checked import Bytes, Count
from deployments.simulator.clock import Clock
from deployments.simulator.disturbance import Disturbance
from deployments.simulator.profile import Profile
from deployments.simulator.records import Stretch
from deployments.simulator.tiers import Tier
from deployments.simulator.timed_run import TimedRun
from deployments.simulator.work import work_of
from engine.scheduler.adapter_slots import AdapterSlots
from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.block_manager import BlockManager
from engine.scheduler.decode_run import LightBatch
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.memory import MemoryBudget
from engine.scheduler.request import Request
from engine.scheduler.scheduler import Progress, Scheduler
from engine.scheduler.step_time import StepShape

NO_BATCH = ScheduledBatch(())
MAX_REPORTED = 256  # adapters in memory, as an engine reports them
TOKEN = 0  # what every step samples: the simulator knows lengths, not texts


class ReplicaSize(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The limits of one replica's engine and of its memory for adapters."""

    max_num_seqs: Count = 32
    max_num_batched_tokens: Count = 512
    max_model_len: Count = 4096
    block_size: Count = 16
    block_bytes: Bytes = 2**20
    memory_bytes: Bytes = 4 * 2**30  # of the arena that KV blocks and adapters share
    max_adapters: Count = 10_000  # in the arena at once
    host_bytes: Bytes = 16 * 2**30
    disk_bytes: Bytes = 256 * 2**30


@dataclass(slots=True)
class LoadCounts:
    """How often an adapter had to be brought, by where it came from."""

    remote: int = 0
    disk: int = 0
    host: int = 0  # into the arena

    def __add__(self, other: "LoadCounts") -> "LoadCounts":
        return LoadCounts(
            self.remote + other.remote, self.disk + other.disk, self.host + other.host
        )

    def __sub__(self, other: "LoadCounts") -> "LoadCounts":
        return self + LoadCounts(-other.remote, -other.disk, -other.host)


class Listener(Protocol):
    """Is told of new tokens."""

    def on_progress(self, progress: list[Progress]) -> None: ...

    def on_run(self, requests: Sequence[Request], stretch: Stretch) -> None:
        """Each request has got a token, not its first one, of each of these steps."""
        ...

    def on_end(self, request: Request) -> None:
        """Told after its last token."""
        ...


class SimulatedReplica:
    """Runs its steps as events of the clock."""

    def __init__(
        self,
        replica_id: str,
        size: ReplicaSize,
        profile: Profile,
        clock: Clock,
        listener: Listener,
        *,
        runs_together: bool = True,
        slowness: Callable[[float], float] = lambda _: 1.0,
    ) -> None:
        self.replica_id, self.size = replica_id, size
        self._profile, self._clock, self._listener = profile, clock, listener
        self._runs_together = runs_together  # steps that only decode, in one event
        self._slowness = slowness  # of the store, by the time
        self._disturbance = Disturbance(profile.step.disturbed, replica_id)
        self._run: TimedRun | None = None
        self.scheduler = make_scheduler(size)
        self._host = Tier(size.host_bytes, self._is_wanted, self.scheduler.adapters.stays)
        self._disk = Tier(size.disk_bytes, self._is_wanted)
        self._wanted: dict[str, int] = {}  # requests by adapter
        self._sizes: dict[str, int] = {}  # of adapters that requests have named
        self._digests: dict[int, str] = {}  # by slot
        self._coming: set[str] = set()
        self._is_stepping = False
        self.is_dead = self.is_draining = False
        self.loads = LoadCounts()
        self.num_received = self.num_steps = 0
        self.service_gap = 0.0  # the largest one between two tenants
        self._adapter_bytes = 0  # of the latest one
        self._meter = LoadMeter()

    # ==== requests ====

    def submit(self, request: Request, nbytes: int) -> None:
        """Take a request, whose adapter is of this size. Raises InvalidRequest if it never fits."""
        self._catch_up()  # a tenant's place depends on what others have been given by now
        self.scheduler.add(request)
        self.num_received += 1
        self._meter.received(request.num_prompt_tokens)
        digest = request.adapter_digest
        if digest:
            self._wanted[digest] = self._wanted.get(digest, 0) + 1
            self._sizes[digest] = self._adapter_bytes = nbytes
            self._host.touch(digest)
            self._disk.touch(digest)
            self._bring(digest, nbytes)
        self._note_gap()
        self._shorten_run()
        self._step_if_idle(after_idle=True)

    def prewarm(self, digest: str, nbytes: int) -> None:
        """Begin to bring an adapter that will be asked for."""
        self._sizes[digest] = self._adapter_bytes = nbytes
        self._bring(digest, nbytes)

    def kill(self) -> list[Request]:
        """End the replica at once; return the requests that it had."""
        self._catch_up()
        self.is_dead = True
        return [*self.scheduler.running, *self.scheduler.waiting]

    @property
    def num_requests(self) -> int:
        return len(self.scheduler.running) + self.scheduler.num_waiting

    def figures(self) -> ReplicaFigures:
        """Report to routers, as a real replica does."""
        self._catch_up()
        self._note_gap()
        rates = self.scheduler.rates
        return ReplicaFigures(
            num_received=self.num_received,
            queued_tokens=self.scheduler.queued_tokens,
            num_requests=self.num_requests,
            max_num_seqs=self.size.max_num_seqs,
            kv_used=self._kv_used,
            device_adapters=frozenset(self.scheduler.adapters.in_memory(MAX_REPORTED)),
            disk_adapters=self._disk.digests,
            tokens_per_s=rates.tokens_per_s,
            disk_load_s=self._profile.decode_s(self._adapter_bytes),
            remote_load_s=self._profile.fetch_s(self._adapter_bytes),
            crowding_s=rates.row_s * self._meter.mean_answer,
        )

    def load(self) -> ReplicaLoad:
        """Report to the autoscaler, as a real replica does."""
        self._catch_up()
        arrivals = self._meter.read(self._clock.now_s)
        return ReplicaLoad(
            queued_tokens=self.scheduler.queued_tokens,
            kv_used=self._kv_used,
            num_requests=self.num_requests,
            adapters_used=self.scheduler.adapters_used,
            prompt_tokens_per_s=arrivals.prompt_tokens_per_s,
            output_tokens_per_s=arrivals.output_tokens_per_s,
            wait_s=arrivals.wait_s,
            capacity=Capacity(self.size.max_num_seqs, *self.scheduler.rates),
        )

    def _note_gap(self) -> None:
        """Between two calls the gap changes in one direction, so none that is larger is missed."""
        if len(self.scheduler.waiting.flows) > 1:
            self._catch_up()
            self.service_gap = max(self.service_gap, self.scheduler.service_gap)

    @property
    def _kv_used(self) -> float:
        scheduler = self.scheduler
        return scheduler.blocks.num_held / max(scheduler.memory.num_reachable_blocks, 1)

    # ==== adapters ====

    def _is_wanted(self, digest: str) -> bool:
        return digest in self._wanted

    def _bring(self, digest: str, nbytes: int) -> None:
        """Begin to bring an adapter into host memory, unless it is there or on its way."""
        if digest in self._coming or self.scheduler.adapters.is_ready(digest):
            return
        self._coming.add(digest)
        delay_s = self._profile.decode_s(nbytes)
        if digest in self._disk:
            self.loads.disk += 1
        else:
            self.loads.remote += 1
            delay_s += self._profile.fetch_s(nbytes) * self._slowness(self._clock.now_s)
        self._clock.after(delay_s, lambda: self._arrive(digest, nbytes))

    def _arrive(self, digest: str, nbytes: int) -> None:
        if self.is_dead:
            return
        self._coming.discard(digest)
        if digest not in self._disk:
            self._disk.put(digest, nbytes)
        for gone in self._host.put(digest, nbytes):
            self.scheduler.adapters.set_absent(gone)
        self.scheduler.adapters.set_ready(digest, nbytes)
        self._note_gap()
        self._shorten_run()
        self._step_if_idle(after_idle=True)

    def _let_go(self, digest: str) -> None:
        self._wanted[digest] -= 1
        if not self._wanted[digest]:
            del self._wanted[digest]

    def _bring_lost(self) -> None:
        """Bring adapters that waiting requests want and that had been on the device alone."""
        for digest in list(self._wanted):
            self._bring(digest, self._sizes[digest])

    # ==== steps ====

    def _step_if_idle(self, *, after_idle: bool = False) -> None:
        if self._is_stepping or self.is_dead:
            return
        self._note_gap()
        if self._runs_together and self._begin_run():
            return
        batch = self._schedule()
        if batch is None:
            return
        changes = batch.rest
        if changes.adapter_evictions:
            self._bring_lost()
        self._is_stepping = True
        self.loads.host += len(changes.adapter_loads)
        for load in changes.adapter_loads:
            self._digests[load.slot] = load.digest
        work = work_of(changes, self._digests, self._sizes, batch.decodes)
        work = work._replace(new_requests=self._num_new(changes), after_idle=int(after_idle))
        step_s = self._profile.step_s(work) + self._disturbance.of_step(self.num_steps)
        self.num_steps += 1
        self._clock.after(step_s, lambda: self._end_step(batch, work.shape, step_s))

    def _num_new(self, batch: ScheduledBatch) -> int:
        """Count the requests that have not been in a step before."""
        owners, now_s = map(self.scheduler.owner, batch.requests), self._clock.now_s
        return sum(owner is not None and owner.first_scheduled_s == now_s for owner in owners)

    def _schedule(self) -> LightBatch | None:
        """Schedule a step; if every step is an event of its own, every request has its row."""
        now_s = self._clock.now_s
        if self._runs_together:
            return self.scheduler.schedule_light(now_s, TOKEN)
        batch = self.scheduler.schedule(now_s)
        return None if batch is None else LightBatch([], batch)

    def _end_step(self, batch: LightBatch, shape: StepShape, step_s: float) -> None:
        self._is_stepping = False
        if self.is_dead:
            return
        for load in batch.rest.adapter_loads:
            self.scheduler.adapters.set_resident(load.digest)
        ended, progress = self.scheduler.update_light(batch, TOKEN)
        self.scheduler.observe_light(batch, shape, step_s)
        if batch.decodes:
            now_s = self._clock.now_s
            self._listener.on_run(batch.decodes, Stretch(now_s, now_s, 0.0, 1))
        for each in progress:
            self._note_wait(each)
        self._listener.on_progress(progress)
        self._end([*ended, *(each.request for each in progress)])
        self._step_if_idle()

    def _note_wait(self, progress: Progress) -> None:
        request = progress.request
        num_new = len(request.output_token_ids) - request.num_resumed_tokens
        if num_new == len(progress.token_ids) and request.first_scheduled_s is not None:
            self._meter.waited(request.first_scheduled_s - request.arrival_s)

    def _end(self, requests: Sequence[Request]) -> None:
        """Let go of those that have ended."""
        for request in requests:
            if request.finish_reason is not None:
                self._meter.answered(len(request.output_token_ids))
                if request.adapter_digest:
                    self._let_go(request.adapter_digest)
                self._listener.on_end(request)

    # ==== steps that only decode, together ====

    def _begin_run(self) -> bool:
        run = self.scheduler.begin_run(TOKEN)
        if run is None:
            return False
        work = work_of(NO_BATCH, self._digests, self._sizes, run.rows)
        now_s, number = self._clock.now_s, self.num_steps
        timed = TimedRun(run, work, self.scheduler, self._profile, now_s, self._disturbance, number)
        self._run = timed
        self._is_stepping = True
        self.num_steps += 1
        self._clock.at(timed.end_s, lambda: self._end_run(timed))
        return True

    def _catch_up(self) -> None:
        """Have the state that the steps before now have led to."""
        if self._run is not None and (count := self._run.num_over(self._clock.now_s)):
            self._pass(self._run, count)

    def _pass(self, timed: TimedRun, count: int) -> None:
        """End the oldest `count` steps, and schedule as many, which are not the last ones."""
        self.num_steps += count
        stretch = timed.pass_steps(count)
        self._listener.on_run(timed.run.rows, stretch)

    def _shorten_run(self) -> None:
        """After the step in progress, other requests may be in the batch."""
        timed = self._run
        if timed is not None and not self.scheduler.is_blocked(timed.num_left_tokens):
            self._catch_up()
            if timed.shorten():
                self._clock.at(timed.end_s, lambda: self._end_run(timed))

    def _end_run(self, timed: TimedRun) -> None:
        if timed is not self._run or self._clock.now_s != timed.end_s or self.is_dead:
            return  # it was to end later, and has ended
        if count := timed.num_before_last:
            self._pass(timed, count)
        self._run, self._is_stepping = None, False
        stretch = timed.pass_last()
        ended = self.scheduler.end_run(timed.run)
        self._listener.on_run(timed.run.rows, stretch)
        self._end(ended)
        self._step_if_idle()


def make_scheduler(size: ReplicaSize) -> Scheduler:
    """Return the scheduler of an engine of this size, just as the engine makes it."""
    num_blocks = size.memory_bytes // size.block_bytes
    memory = MemoryBudget(
        num_blocks * size.block_bytes,
        size.block_bytes,
        BlockManager(num_blocks, size.block_size, prefix_caching=True),
        AdapterSlots(loads_are_immediate=True),
        max_adapters=size.max_adapters,
    )
    limits = SchedulerLimits(size.max_num_seqs, size.max_num_batched_tokens, size.max_model_len)
    return Scheduler(limits, memory)
