"""Asks the backends what a device can compute and hold, before anything is loaded."""

from engine.backends.cuda import checks, memory
from engine.settle import Demand

DEFAULT_MEMORY_BYTES = 2 * 2**30  # on a CPU


def arena_bytes(demand: Demand) -> int:
    """Implement ArenaBytes. Host memory is not divided: the configured size is used as it is."""
    checks.check(demand)
    if demand.device.type == "cuda":
        return memory.memory_bytes(demand)
    asked = demand.config.memory_bytes
    return DEFAULT_MEMORY_BYTES if asked is None else asked
