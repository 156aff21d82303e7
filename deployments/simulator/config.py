"""Simulation: the file that `reef simulate` reads."""

from pathlib import Path
from typing import Any

import msgspec

from deployments.simulator.checked import Bytes, Count, InvalidSimulation, Positive, Seconds, Share
from deployments.simulator.floors import below_floor
from deployments.simulator.profile import Profile
from deployments.simulator.replica import ReplicaSize
from deployments.simulator.routers import ROUTERS
from deployments.simulator.scaling import Scaling
from deployments.simulator.workload import Workload
from deployments.strict_yaml import YamlMistake, read_yaml


class Faults(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """0: never.

    `kill_every_s` ends a replica at once, again and again. `reclaim_every_s` takes one back as a
    cloud does with spot machines: from the notice on it gets nothing new, and it ends `notice_s`
    later. In [slow_store_at_s, slow_store_at_s + slow_store_s) fetches take `slow_store_factor`
    times as long.
    """

    kill_every_s: Seconds = 0.0
    reclaim_every_s: Seconds = 0.0
    notice_s: Seconds = 30.0
    slow_store_at_s: Seconds = 0.0
    slow_store_s: Seconds = 0.0
    slow_store_factor: Positive = 10.0

    def slowness(self, now_s: float) -> float:
        """Return by how much a fetch that begins now takes longer."""
        is_slow = 0 <= now_s - self.slow_store_at_s < self.slow_store_s
        return self.slow_store_factor if is_slow else 1.0


class FleetSection(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    router: str = "reef"  # one of ROUTERS
    ingresses: Count = 1
    size: ReplicaSize = ReplicaSize()
    scaling: Scaling = Scaling()
    gpus: Seconds = 1.0  # of one replica
    price_per_hour: Seconds = 0.0  # of one replica, in any currency
    adapter_bytes: Bytes | tuple[Bytes, ...] = 20 * 2**20  # of all, or of each in turn

    def __post_init__(self) -> None:
        if self.router not in ROUTERS:
            raise ValueError(f"router is {self.router!r}, not one of {', '.join(ROUTERS)}")
        if not self.adapter_bytes:
            raise ValueError("adapter_bytes must be a size or a list of sizes, not []")

    @property
    def most_adapter_bytes(self) -> int:
        sizes = self.adapter_bytes
        return sizes if isinstance(sizes, int) else max(sizes)

    @property
    def least_adapter_bytes(self) -> int:
        sizes = self.adapter_bytes
        return sizes if isinstance(sizes, int) else min(sizes)

    def bytes_of(self, adapter: int) -> int:
        sizes = self.adapter_bytes
        return sizes if isinstance(sizes, int) else sizes[adapter % len(sizes)]


class Objective(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a request must keep to count as served well, and the part of all that should."""

    ttft_s: Seconds = 2.0
    tpot_s: Seconds = 0.1
    attained: Share = 0.99


class Simulation(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    duration_s: Seconds = 300.0
    warm_up_s: Seconds = 0.0  # requests that come before it are not reported
    workload: Workload = Workload()
    fleet: FleetSection = FleetSection()
    profile: Profile = Profile()
    faults: Faults = Faults()
    objective: Objective = Objective()


def read_simulation(path: Path) -> Simulation:
    """Read a file; a trace's path is relative to it. Raises InvalidSimulation."""
    try:
        document = read_yaml(path)
    except (OSError, YamlMistake) as error:
        raise InvalidSimulation(f"{path}: {error}") from None
    simulation = as_simulation(document or {}, str(path))
    trace = simulation.workload.trace
    if trace is None:
        return simulation
    placed = msgspec.structs.replace(trace, file=str(path.parent / trace.file))
    workload = msgspec.structs.replace(simulation.workload, trace=placed)
    return msgspec.structs.replace(simulation, workload=workload)


def with_router(simulation: Simulation, router: str) -> Simulation:
    """Return the same simulation with another router. Raises InvalidSimulation."""
    if router not in ROUTERS:
        raise InvalidSimulation(f"--router {router!r} is not one of {', '.join(ROUTERS)}")
    fleet = msgspec.structs.replace(simulation.fleet, router=router)
    return msgspec.structs.replace(simulation, fleet=fleet)


def as_simulation(document: Any, name: str) -> Simulation:
    """Raises InvalidSimulation."""
    try:
        simulation = msgspec.convert(document, Simulation)
    except (msgspec.ValidationError, ValueError) as error:
        raise InvalidSimulation(f"{name}: {error}") from None
    if mistake := impossibility(simulation):
        raise InvalidSimulation(f"{name}: {mistake}")
    return simulation


def impossibility(simulation: Simulation) -> str:
    """Why this cannot be simulated or cannot be kept, with the numbers; empty if it can."""
    size, adapter_bytes = simulation.fleet.size, simulation.fleet.most_adapter_bytes
    longest = simulation.workload.most_tokens
    if longest > size.max_model_len:
        return (
            f"workload.prompt.most, workload.prefix.tokens and workload.output.most are {longest} "
            f"tokens together; fleet.size.max_model_len is {size.max_model_len}"
        )
    needed = -(-longest // size.block_size) * size.block_bytes + adapter_bytes
    if needed > size.memory_bytes:
        return (
            f"the longest request and its adapter need {needed} bytes; fleet.size.memory_bytes is "
            f"{size.memory_bytes}"
        )
    return below_floor(simulation)
