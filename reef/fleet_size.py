"""The sizes of a simulated replica, by a model's memory formula."""

from typing import TYPE_CHECKING

import msgspec

from deployments.simulator.config import InvalidSimulation, Simulation, impossibility

if TYPE_CHECKING:
    from engine.plan.report import Plan


def sized(simulation: Simulation, planned: "Plan") -> Simulation:
    """Return the simulation with replicas that hold the planned model in its memory.

    KV blocks and adapters get what the weights leave. Raises InvalidSimulation.
    """
    from engine.sizes import adapter_bytes, kv_bytes, weight_bytes

    size, load = planned.size, planned.load
    weights = weight_bytes(size, size.form)
    if weights >= load.memory_bytes:
        raise InvalidSimulation(
            f"the weights are {weights} bytes, and --memory is {load.memory_bytes}"
        )
    cell, block = load.kv_dtype or size.form.dtype, simulation.fleet.size.block_size
    fleet = msgspec.structs.replace(
        simulation.fleet,
        size=msgspec.structs.replace(
            simulation.fleet.size,
            block_bytes=kv_bytes(size, cell, block, block),
            memory_bytes=load.memory_bytes - weights,
        ),
        adapter_bytes=adapter_bytes(size, size.form.dtype, load.lora_rank),
    )
    found = msgspec.structs.replace(simulation, fleet=fleet)
    if mistake := impossibility(found):
        raise InvalidSimulation(f"with the sizes of the model: {mistake}")
    return found
