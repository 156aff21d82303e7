"""Simulation: the file that `reef simulate` reads."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from deployments.simulator.checked import Bytes, Count, Seconds
from deployments.simulator.profile import Profile
from deployments.simulator.replica import ReplicaSize
from deployments.simulator.scaling import Scaling
from deployments.simulator.workload import Workload
from deployments.strict_yaml import YamlMistake, read_yaml


class InvalidSimulation(ValueError):
    """The file says something that cannot be simulated; the message names where and what."""


class Faults(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """0: never. `kill_every_s` ends a replica at once, again and again."""

    kill_every_s: Seconds = 0.0


class FleetSection(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    router: Literal[
        "reef", "power-of-two", "multiplexed", "bounded-hash", "round-robin", "random"
    ] = "reef"
    ingresses: Count = 1
    size: ReplicaSize = ReplicaSize()
    scaling: Scaling = Scaling()
    adapter_bytes: Bytes = 20 * 2**20


class Objective(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a request must keep to count as served well."""

    ttft_s: Seconds = 2.0
    tpot_s: Seconds = 0.1


class Simulation(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    duration_s: Seconds = 300.0
    warm_up_s: Seconds = 0.0  # requests that come before it are not reported
    workload: Workload = Workload()
    fleet: FleetSection = FleetSection()
    profile: Profile = Profile()
    faults: Faults = Faults()
    objective: Objective = Objective()


def read_simulation(path: Path) -> Simulation:
    """Read a file. Raises InvalidSimulation."""
    try:
        document = read_yaml(path)
    except (OSError, YamlMistake) as error:
        raise InvalidSimulation(f"{path}: {error}") from None
    return as_simulation(document or {}, str(path))


def with_router(simulation: Simulation, router: str) -> Simulation:
    """Return the same simulation with another router. Raises InvalidSimulation."""
    document = msgspec.to_builtins(simulation)
    document["fleet"]["router"] = router
    return as_simulation(document, "--router")


def as_simulation(document: Any, name: str) -> Simulation:
    try:
        simulation = msgspec.convert(document, Simulation)
    except (msgspec.ValidationError, ValueError) as error:
        raise InvalidSimulation(f"{name}: {error}") from None
    lengths = simulation.workload.prompt.most + simulation.workload.output.most
    longest = simulation.fleet.size.max_model_len
    if lengths > longest:
        raise InvalidSimulation(
            f"{name}: workload.prompt.most and workload.output.most are {lengths} tokens together; "
            f"fleet.size.max_model_len is {longest}"
        )
    return simulation
