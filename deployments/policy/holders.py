"""Holders: which replicas have an adapter, found by the adapter."""

from collections.abc import Collection, Set

from deployments.policy.replica_view import ReplicaView


class Holders:
    """The replicas of each adapter, in one tier. Not thread-safe."""

    def __init__(self) -> None:
        self._by_adapter: dict[str, dict[ReplicaView, None]] = {}
        self._by_replica: dict[ReplicaView, set[str]] = {}

    def of(self, adapter_digest: str) -> Collection[ReplicaView]:
        return self._by_adapter.get(adapter_digest, ())

    def add(self, view: ReplicaView, adapter_digest: str) -> None:
        self._by_adapter.setdefault(adapter_digest, {})[view] = None
        self._by_replica.setdefault(view, set()).add(adapter_digest)

    def set(self, view: ReplicaView, adapter_digests: Set[str]) -> None:
        """Replace what a replica has. Takes time for what changes."""
        before = self._by_replica.get(view, set[str]())
        for digest in before - adapter_digests:
            self._remove(view, digest)
        for digest in adapter_digests - before:
            self.add(view, digest)

    def forget(self, view: ReplicaView) -> None:
        self.set(view, frozenset())
        self._by_replica.pop(view, None)

    def _remove(self, view: ReplicaView, adapter_digest: str) -> None:
        self._by_replica[view].discard(adapter_digest)
        holders = self._by_adapter[adapter_digest]
        del holders[view]
        if not holders:
            del self._by_adapter[adapter_digest]
