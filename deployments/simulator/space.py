"""Space: the parameters of an autoscaling policy that a search may change, and their ranges."""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from deployments.policy.autoscaling import Range
from deployments.simulator.config import Simulation
from deployments.simulator.ray_policy import RayPolicy
from deployments.simulator.scaling import Autoscaling, Scaling


class Space(NamedTuple):
    """A policy's parameters, with their names in a Serve config."""

    name: str
    ranges: Mapping[str, Range]
    every_default: Mapping[str, float]

    @property
    def defaults(self) -> dict[str, float]:
        """Return the values that a policy has if nobody searches."""
        return {name: self.every_default[name] for name in self.ranges}

    def quick(self, simulation: Simulation) -> dict[str, float]:
        """Return values that follow the load at once, and look as far ahead as a start takes."""
        start_s, seats = simulation.profile.cold_start, simulation.fleet.size.max_num_seqs
        wanted = {
            "busy": 0.9,
            "kv_used": 1.0,
            "lookahead_s": 2.5 * start_s,
            "up_delay_s": 0.5,
            "down_delay_s": start_s / 2,
            "down_margin": 0.9,
            "target_ongoing_requests": seats / 2,
            "upscale_delay_s": 0.5,
            "downscale_delay_s": start_s / 2,
            "look_back_period_s": 4.0,
        }
        return {
            name: min(
                max(wanted.get(name, default), self.ranges[name].least), self.ranges[name].most
            )
            for name, default in self.defaults.items()
        }

    def between(self, simulation: Simulation, part: float) -> dict[str, float]:
        """Return values between the defaults (0) and the quick ones (1)."""
        quick = self.quick(simulation)
        return {
            name: default * (quick[name] / default) ** part
            if self.ranges[name].is_log
            else default + part * (quick[name] - default)
            for name, default in self.defaults.items()
        }

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
        return msgspec.structs.replace(bounds, autoscaling=Autoscaling(**values))

    def block(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the values as keys of a Serve config, with three digits."""
        return {name: float(f"{v:.3g}") for name, v in values.items()}


REEF = Space(
    "reef",
    {
        "busy": Range(0.4, 1.0),
        "kv_used": Range(0.5, 1.0),
        "drain_s": Range(1.0, 60.0, is_log=True),
        "smoothing_s": Range(1.0, 60.0, is_log=True),
        "lookahead_s": Range(0.0, 120.0),
        "up_delay_s": Range(0.0, 20.0),
        "down_delay_s": Range(2.0, 1200.0, is_log=True),
        "down_margin": Range(0.5, 1.0),
    },
    msgspec.structs.asdict(Autoscaling()),
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
    msgspec.structs.asdict(RayPolicy()),
)
SPACES = {space.name: space for space in (REEF, RAY)}
