"""Fleet: replicas, the ingresses' routers in front of them, and faults, in virtual time."""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from random import Random

from deployments.policy.capacity import Objective
from deployments.policy.demand import Demand
from deployments.policy.prefix_memory import prefix_keys
from deployments.policy.prewarm import adapters_to_warm
from deployments.policy.routing import RoutedRequest, RoutingCosts
from deployments.simulator.clock import Clock
from deployments.simulator.config import Simulation
from deployments.simulator.prompts import make_prompt
from deployments.simulator.records import Record, Stretch, Timeline, take_run
from deployments.simulator.replica import LoadCounts, SimulatedReplica
from deployments.simulator.routers import Chooser, make_router
from deployments.simulator.scaling import PERIOD_S, make_scaler
from deployments.simulator.workload import Arrival
from engine.scheduler.request import CacheScope, Request, SamplingParams
from engine.scheduler.scheduler import Progress

ADAPTER = "adapter-"
REPORT_S = 0.5  # between two reports of a replica
PREWARM_S = 5.0  # before a replica takes requests it begins to load what it will be asked for
DEFAULT_ROOM = 16  # adapters that the first replica loads ahead
MAX_SAMPLINGS = 4096  # numbers of tokens of answers that are remembered
NOTICED_S = 0.05  # from a replica's death until its requests go elsewhere


class Fleet:
    """Owns the replicas. `on_record` gets each request once it has ended."""

    def __init__(
        self,
        simulation: Simulation,
        clock: Clock,
        seed: int,
        on_record: Callable[[Record], None],
        *,
        runs_together: bool = True,
    ) -> None:
        self._simulation, self._clock, self._on_record = simulation, clock, on_record
        self._runs_together = runs_together
        fleet = simulation.fleet
        costs = RoutingCosts()
        self._routers = [
            make_router(fleet.router, fleet.size.max_num_seqs, costs, Random(f"{seed}/router/{i}"))
            for i in range(fleet.ingresses)
        ]
        objective = Objective(simulation.objective.ttft_s, simulation.objective.tpot_s)
        self._scaler = make_scaler(fleet.scaling, objective)
        self.num_with_adapter = 0  # requests
        self._counted = LoadCounts()  # before the loads that are reported
        self._open: dict[str, Record] = {}
        self.replicas: dict[str, SimulatedReplica] = {}  # that take requests
        self.leaving: dict[str, SimulatedReplica] = {}
        self.gone: list[SimulatedReplica] = []
        self._held: list[Request] = []  # while there is no replica
        self._starting: dict[str, SimulatedReplica] = {}
        self._demand = Demand()
        self._target = self._num_made = 0
        self.replica_s = 0.0  # replicas times seconds, cold starts included
        self._counted_s = 0.0
        self.timeline = Timeline()
        self._scale_to(fleet.scaling.min, is_start=True)

    @property
    def open_records(self) -> Collection[Record]:
        return self._open.values()

    # ==== requests ====

    def arrive(self, arrival: Arrival) -> None:
        request = _as_request(arrival)
        self._open[request.request_id] = Record(arrival)
        if arrival.adapter >= 0:
            self.num_with_adapter += 1
            self._demand.add(request.adapter_digest, self._clock.now_s)
        self._place(request)

    def _place(self, request: Request, avoid: tuple[str, ...] = ()) -> None:
        ids = list(self.replicas)
        if not ids:
            self._held.append(request)
            return
        record = self._open[request.request_id]
        router = self._router_of(record)
        known = len(request.output_token_ids)
        routed = RoutedRequest(
            request.request_id,
            request.num_prompt_tokens + known,
            request.adapter_digest,
            tuple(r for r in avoid if r in self.replicas),
            prefix_keys=_prefix_keys(request, record.arrival),
        )
        chosen = router.choose(ids, routed)
        router.sent(chosen, routed, self._clock.now_s)
        record.replica = chosen
        replica = self.replicas[chosen]
        replica.submit(request, self._simulation.fleet.bytes_of(record.arrival.adapter))

    def _router_of(self, record: Record) -> Chooser:
        return self._routers[record.arrival.number % len(self._routers)]

    def on_progress(self, progress: list[Progress]) -> None:
        now_s = self._clock.now_s
        for each in progress:
            request = each.request
            record = self._open[request.request_id]
            record.take(len(each.token_ids), now_s, request.num_cached_tokens)

    def on_run(self, requests: Sequence[Request], stretch: Stretch) -> None:
        records = self._open
        take_run([records[request.request_id] for request in requests], stretch)

    def on_end(self, request: Request) -> None:
        record = self._open.pop(request.request_id)
        record.is_finished = True
        self._router_of(record).ended(record.replica, request.num_prompt_tokens)
        self._on_record(record)

    # ==== figures ====

    def begin_to_count(self) -> None:
        """Report no load of an adapter, and no gap between tenants, before now."""
        self._counted, self.num_with_adapter = self._all_loads(), 0
        for replica in self._all_replicas():
            replica.service_gap = 0.0
        self.timeline.begin_to_count()

    @property
    def loads(self) -> LoadCounts:
        return self._all_loads() - self._counted

    @property
    def service_gap(self) -> float:
        return max((replica.service_gap for replica in self._all_replicas()), default=0.0)

    def _all_loads(self) -> LoadCounts:
        return sum((replica.loads for replica in self._all_replicas()), LoadCounts())

    def _all_replicas(self) -> list[SimulatedReplica]:
        return [*self.replicas.values(), *self.leaving.values(), *self.gone]

    def report(self) -> None:
        """Every replica reports to every router."""
        for replica in self.replicas.values():
            figures = replica.figures()
            for router in self._routers:
                router.report(replica.replica_id, figures)
        if self.replicas:
            loads = [replica.num_requests for replica in self.replicas.values()]
            self.timeline.add(self._clock.now_s, len(loads), loads)
        self._clock.after(REPORT_S, self.report)

    # ==== the number of replicas ====

    def scale(self) -> None:
        """Ask the policy, and carry out what it wants."""
        loads = [replica.load() for replica in self.replicas.values()]
        wanted = self._scaler.decide(loads, self._target, len(self._held), self._clock.now_s)
        self._scale_to(wanted)
        self._retire_drained()
        self._clock.after(PERIOD_S, self.scale)

    def _scale_to(self, target: int, is_start: bool = False) -> None:
        delay_s = 0.0 if is_start else self._simulation.profile.cold_start
        self._count()
        for _ in range(target - self._target):
            self._num_made += 1
            name = f"replica-{self._num_made}"
            self._start_after(delay_s, name)
        for _ in range(self._target - target):
            self._drain_one()
        self._target = target

    def _start_after(self, delay_s: float, name: str) -> None:
        ahead_s = min(delay_s, PREWARM_S)
        self._clock.after(delay_s - ahead_s, lambda: self._load_ahead(name))
        self._clock.after(delay_s, lambda: self._start(name))

    def _load_ahead(self, name: str) -> None:
        """Bring what a replica that starts will be asked for into its host memory."""
        replica = self._starting[name] = self._make(name)
        if self._simulation.fleet.router != "reef":
            return
        loads = [len(each.scheduler.adapters.resident) for each in self.replicas.values()]
        shares, room = self._demand.shares(1000), max(loads, default=0) or DEFAULT_ROOM
        for digest in adapters_to_warm(shares, self.replicas, name, len(self._open), room):
            number = int(digest.removeprefix(ADAPTER))
            replica.prewarm(digest, self._simulation.fleet.bytes_of(number))

    def _start(self, name: str) -> None:
        self.replicas[name] = self._starting.pop(name)
        held, self._held = self._held, []
        for request in held:
            self._place(request)

    def _make(self, name: str) -> SimulatedReplica:
        simulation = self._simulation
        return SimulatedReplica(
            name,
            simulation.fleet.size,
            simulation.profile,
            self._clock,
            self,
            runs_together=self._runs_together,
            slowness=simulation.faults.slowness,
        )

    def _drain_one(self) -> None:
        """Serve stops what it likes; here the newest replica."""
        if not self.replicas:
            return
        name = next(reversed(self.replicas))
        self.leaving[name] = self.replicas.pop(name)
        self._forget()

    def _retire_drained(self) -> None:
        for name, replica in list(self.leaving.items()):
            if not replica.num_requests:
                self._count()
                self.gone.append(self.leaving.pop(name))

    # ==== faults ====

    def kill_one(self, rng: Random) -> None:
        """End one replica at once; its requests go on elsewhere, another replica is started."""
        if self.replicas:
            self._end(self._lose(rng))

    def reclaim_one(self, rng: Random) -> None:
        """Take one replica back: nothing new from now on, its end after the notice."""
        if not self.replicas:
            return
        replica = self._lose(rng)
        self.leaving[replica.replica_id] = replica
        notice_s = self._simulation.faults.notice_s
        self._clock.after(notice_s, lambda: self._reclaim(replica.replica_id))

    def _reclaim(self, name: str) -> None:
        if name in self.leaving:
            self._count()
            self._end(self.leaving.pop(name))

    def _lose(self, rng: Random) -> SimulatedReplica:
        """Take a replica from those that get requests, and start another."""
        self._count()
        replica = self.replicas.pop(rng.choice(list(self.replicas)))
        self._forget()
        self._num_made += 1
        started = f"replica-{self._num_made}"
        self._start_after(self._simulation.profile.cold_start, started)
        return replica

    def _end(self, replica: SimulatedReplica) -> None:
        self.gone.append(replica)
        for request in replica.kill():
            again = _resumed(request)
            self._clock.after(
                NOTICED_S, lambda again=again: self._place(again, (replica.replica_id,))
            )

    def _forget(self) -> None:
        """Tell the routers who is left."""
        for router in self._routers:
            router.keep(self.replicas)

    def _count(self) -> None:
        """Count the time of all replicas until now."""
        now_s = self._clock.now_s
        self.replica_s += (now_s - self._counted_s) * (self._target + len(self.leaving))
        self._counted_s = now_s

    def close(self) -> Iterable[SimulatedReplica]:
        """Count until now; return all replicas that there were."""
        self._count()
        return self._all_replicas()


def _as_request(arrival: Arrival) -> Request:
    digest = f"{ADAPTER}{arrival.adapter}" if arrival.adapter >= 0 else ""
    return Request(
        str(arrival.number),
        make_prompt(arrival.number, arrival.num_prompt_tokens, arrival.shared),
        _sampling(arrival.num_output_tokens),
        arrival.time_s,
        scope=CacheScope(arrival.tenant, "", digest),
        weight=arrival.weight,
    )


@lru_cache(MAX_SAMPLINGS)
def _sampling(num_tokens: int) -> SamplingParams:
    """Return parameters that are checked once for all requests with as many tokens."""
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def _prefix_keys(request: Request, arrival: Arrival) -> tuple[int, ...]:
    """Return the keys of a prompt that others may share, as an ingress makes them."""
    if not arrival.shared:
        return ()
    scope = request.scope
    return prefix_keys(request.prompt_token_ids, scope.tenant, scope.salt, scope.adapter_digest)


def _resumed(request: Request) -> Request:
    """The same request on another replica, after the tokens that it has."""
    return Request(
        request.request_id,
        request.prompt_token_ids,
        request.sampling,
        request.arrival_s,
        scope=request.scope,
        priority=request.priority,
        weight=request.weight,
        output_token_ids=list(request.output_token_ids),
        num_resumed_tokens=len(request.output_token_ids),
    )
