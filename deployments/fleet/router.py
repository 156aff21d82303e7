"""AdapterRouter: Ray's request router on top of `policy.routing`.

Ray pickles this module by value and runs it on the event loop of every ingress replica, so nothing
here waits. All decisions are made in `policy.routing`; all that is known of a request is in its
first argument, a `protocol.Hints`.
"""

import time
import uuid
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.fleet.protocol import DIGEST_CHARS, Hints
from deployments.policy.replica_view import ReplicaFigures
from deployments.policy.routing import RoutedRequest, Router, RoutingCosts


def to_stats(figures: ReplicaFigures) -> dict[str, Any]:
    """Write a replica's routing stats. Rounded, because every change is sent to all routers."""
    return {
        "num_received": figures.num_received,
        "queued_tokens": round(figures.queued_tokens, -2),
        "num_requests": figures.num_requests,
        "max_num_seqs": figures.max_num_seqs,
        "kv_used": round(figures.kv_used, 1),
        "device": sorted(digest[:DIGEST_CHARS] for digest in figures.device_adapters),
        "disk": sorted(digest[:DIGEST_CHARS] for digest in figures.disk_adapters),
        "tokens_per_s": _rounded(figures.tokens_per_s),
        "disk_load_s": _rounded(figures.disk_load_s),
        "remote_load_s": _rounded(figures.remote_load_s),
        "crowding_s": _rounded(figures.crowding_s),
    }


def _rounded(figure: float) -> float:
    """Round to one digit and a half, so that a figure that moves a little is the same figure."""
    return float(f"{2 * figure:.1g}") / 2


def from_stats(stats: dict[str, Any]) -> ReplicaFigures:
    fields = dict(stats)
    device, disk = frozenset(fields.pop("device")), frozenset(fields.pop("disk"))
    return ReplicaFigures(**fields, device_adapters=device, disk_adapters=disk)


class AdapterRouter(RequestRouter):
    """Sends calls with a target to it or, if it is gone, to another replica, which refuses them.

    For Ray a replica that is being stopped is no candidate any more. Here one that has been a
    target stays reachable for `keep_s`, for such calls only: its requests are still running.
    """

    def initialize_state(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, max_num_seqs: int, keep_s: float = 60.0
    ) -> None:
        """Called by Ray. `max_num_seqs` is the same for every replica."""
        unheard = ReplicaFigures(max_num_seqs=max_num_seqs)
        self._router = Router(RoutingCosts(), unheard, uuid.uuid4().hex)
        self._stats: dict[str, dict[str, Any]] = {}
        self._named: set[str] = set()
        self._leaving: dict[str, tuple[float, RunningReplica]] = {}
        self._keep_s = keep_s

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        now = time.monotonic()
        running = {replica.replica_id.unique_id for replica in replicas}
        for replica in self.curr_replicas.values():
            replica_id = replica.replica_id.unique_id
            if replica_id in self._named and replica_id not in running:
                self._leaving.setdefault(replica_id, (now + self._keep_s, replica))
        self._leaving = {
            replica_id: (until, replica)
            for replica_id, (until, replica) in self._leaving.items()
            if replica_id not in running and until > now
        }
        self._named &= running | self._leaving.keys()
        self._router.keep(running)
        self._stats = {r: stats for r, stats in self._stats.items() if r in running}
        super().update_replicas([*replicas, *(replica for _, replica in self._leaving.values())])

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        candidates = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        hints = pending_request.args[0]
        if hints.target in candidates:
            self._named.add(hints.target)
            hints.is_leaving = hints.target in self._leaving
            return [[candidates[hints.target]]]
        running = [r for r in candidates if r not in self._leaving]
        if not running:
            return []  # wait for one: those that leave take nothing new
        best = self._choose(running, candidates, hints)
        others = [r for r in running if r != best]
        ranks = [[r for r in others if (r in hints.avoid) == is_last] for is_last in (False, True)]
        return [[candidates[best]], *([candidates[r] for r in rank] for rank in ranks if rank)]

    def _choose(self, ids: list[str], candidates: dict[str, RunningReplica], hints: Hints) -> str:
        for replica_id in ids:
            stats = candidates[replica_id].routing_stats
            if stats and stats is not self._stats.get(replica_id):
                self._stats[replica_id] = stats
                self._router.report(replica_id, from_stats(stats))
        for replica_id, num_tokens in hints.ended:
            self._router.ended(replica_id, num_tokens)
        adapter_digest = hints.adapter_digest[:DIGEST_CHARS]
        request = RoutedRequest(
            hints.request_id,
            hints.num_prompt_tokens,
            adapter_digest,
            hints.avoid,
            hints.session,
            hints.prefix_keys,
        )
        best = self._router.choose(ids, request)
        if hints.request_id:
            self._router.sent(best, request, time.monotonic())
        return best
