"""Reconcile what an ingress and a replica believe: each lets go of what the other has forgotten."""

from collections.abc import Mapping

from deployments.fleet.failover import Attempt
from deployments.fleet.protocol import Lease
from deployments.fleet.replica_stream import ReplicaStream


def forgotten_attempts(
    attempts: Mapping[str, Attempt],
    stream: ReplicaStream,
    lease: Lease,
    now_s: float,
    lost_s: float,
) -> list[Attempt]:
    """Find the attempts that their replica has not known for `lost_s`. Notes since when."""
    forgotten: list[Attempt] = []
    for attempt in attempts.values():
        if attempt.replica is not stream:
            continue
        if attempt.id in lease.live_request_ids:
            attempt.missing_since_s = None
        elif attempt.missing_since_s is None:
            attempt.missing_since_s = now_s  # its last output may just be on its way
        elif now_s - attempt.missing_since_s > lost_s:
            forgotten.append(attempt)
    return forgotten


def orphans(attempts: Mapping[str, Attempt], stream: ReplicaStream, lease: Lease) -> list[str]:
    """Find the ids that the replica works on and no attempt waits for there."""

    def is_orphan(request_id: str) -> bool:
        attempt = attempts.get(request_id)
        return attempt is None or (attempt.replica is not None and attempt.replica is not stream)

    return [each for each in sorted(lease.live_request_ids) if is_orphan(each)]
