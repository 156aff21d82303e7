"""Measures what is free on the cluster, and what one more engine replica would take."""

# Ray's own types are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from pathlib import Path
from typing import Any

import psutil
import ray

from deployments.config_sections import ModelSection
from deployments.policy.redeploy import Needs, Room

DEFAULT_MEMORY_BYTES = 2 * 2**30  # the engine's on a CPU


def free_room() -> Room:
    """Ask Ray and, if it is the only one, this machine."""
    if not ray.is_initialized():
        return Room()
    nodes: list[dict[str, Any]] = ray.nodes()
    num_machines = sum(1 for node in nodes if node["Alive"])
    return Room(
        has_gpus=ray.cluster_resources().get("GPU", 0) > 0,
        num_cpus=ray.available_resources().get("CPU", 0.0),
        nbytes=psutil.virtual_memory().available if num_machines == 1 else None,
    )


def needs_of(model: ModelSection) -> Needs:
    """Estimate what one replica takes: its weights as they are on disk, and its arena."""
    weights = sum(path.stat().st_size for path in Path(model.source).glob("*.safetensors"))
    arena = model.engine.memory_bytes
    return Needs(
        device=model.engine.device,
        num_gpus=model.replicas.num_gpus,
        num_cpus=model.replicas.num_cpus,
        nbytes=weights + (DEFAULT_MEMORY_BYTES if arena is None else arena),
    )
