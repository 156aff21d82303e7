"""Decides how many replicas a redeploy starts before it stops old ones.

Started first, a new replica needs its CPUs and its memory while the old one still has its own. In
return somebody answers all the time. Without room for that, Ray would wait for the CPUs without
end, or the kernel would end the engine that serves; then the old replica is stopped first.
"""

from dataclasses import dataclass

ONE_REPLICA = 1  # percent; Ray rounds up, so it is one replica of up to a hundred
NO_REPLICA = 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What one more engine replica takes."""

    device: str  # "auto", "cpu" or "cuda"
    num_gpus: float
    num_cpus: float
    nbytes: int  # of memory


@dataclass(frozen=True, slots=True)
class Room:
    """What is free for it. None is not known, and refuses nothing."""

    has_gpus: bool = False
    num_cpus: float | None = None
    nbytes: int | None = None


def replicas_first(needs: Needs, room: Room) -> tuple[int, Room, str]:
    """Return how many percent of replicas to start first, the room that this leaves, and why."""
    if needs.device == "cuda" or needs.num_gpus > 0 or (needs.device == "auto" and room.has_gpus):
        return NO_REPLICA, room, "a second engine would need a GPU of its own"
    if room.num_cpus is not None and room.num_cpus < needs.num_cpus:
        return NO_REPLICA, room, f"{room.num_cpus:g} CPUs are free, not {needs.num_cpus:g}"
    if room.nbytes is not None and room.nbytes < needs.nbytes:
        reason = f"{room.nbytes} bytes of memory are free, not {needs.nbytes}"
        return NO_REPLICA, room, reason
    num_cpus = None if room.num_cpus is None else room.num_cpus - needs.num_cpus
    nbytes = None if room.nbytes is None else room.nbytes - needs.nbytes
    return ONE_REPLICA, Room(room.has_gpus, num_cpus, nbytes), "there is room for one more"
