"""Space: the parameters of an autoscaling policy that a search may change, and their ranges."""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from deployments.simulator.config import Simulation
from deployments.simulator.ray_policy import RayPolicy
from deployments.simulator.scaling import Scaling


class Range(NamedTuple):
    """Both ends belong to it. With `is_log` the search looks at ratios."""

    least: float
    most: float
    is_log: bool = False


class Space(NamedTuple):
    """A policy's parameters. `keys` are their names in a Serve config, where they have others."""

    name: str
    ranges: Mapping[str, Range]
    keys: Mapping[str, str] = {}

    def place(self, simulation: Simulation, values: Mapping[str, float]) -> Simulation:
        """Return the simulation with this policy, and its bounds as they were."""
        scaling = simulation.fleet.scaling
        changed = self.scaling(scaling, values)
        fleet = msgspec.structs.replace(simulation.fleet, scaling=changed)
        return msgspec.structs.replace(simulation, fleet=fleet)

    def scaling(self, scaling: Scaling, values: Mapping[str, float]) -> Scaling:
        bounds = Scaling(scaling.min, scaling.max)
        if self is RAY:
            return msgspec.structs.replace(bounds, ray=RayPolicy(**values))
        return msgspec.structs.replace(bounds, **values)

    def block(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the values as keys of a Serve config, with three digits."""
        return {self.keys.get(name, name): float(f"{v:.3g}") for name, v in values.items()}


REEF = Space(
    "reef",
    {
        "queued_tokens": Range(128.0, 32768.0, is_log=True),
        "kv_used": Range(0.2, 1.0),
        "num_requests": Range(1.0, 256.0, is_log=True),
        "upscale_delay_s": Range(0.5, 60.0, is_log=True),
        "downscale_delay_s": Range(2.0, 1200.0, is_log=True),
    },
    {
        "queued_tokens": "target_queued_tokens",
        "kv_used": "target_kv_used",
        "num_requests": "target_requests",
    },
)
RAY = Space(
    "ray",
    {
        "target_ongoing_requests": Range(1.0, 256.0, is_log=True),
        "upscaling_factor": Range(0.3, 3.0, is_log=True),
        "downscaling_factor": Range(0.1, 2.0, is_log=True),
        "upscale_delay_s": Range(0.5, 60.0, is_log=True),
        "downscale_delay_s": Range(2.0, 1200.0, is_log=True),
        "look_back_period_s": Range(1.0, 60.0, is_log=True),
    },
)
SPACES = {space.name: space for space in (REEF, RAY)}
